"""``python -m dtron.profile``; the program is in tools/profile.py."""

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

from dtron.runtime.exit import run_cli
from dtron.tools.profile import main

if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
