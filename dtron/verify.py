"""``python -m dtron.verify``; the program is in tools/verify.py."""

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

from dtron.runtime.exit import run_cli
from dtron.tools.verify import main

if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
