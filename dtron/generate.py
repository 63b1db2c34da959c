"""``python -m dtron.generate``; the program is in tools/generate.py."""

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

from dtron.runtime.exit import run_cli
from dtron.tools.generate import main

if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
