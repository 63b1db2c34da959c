"""``python -m dtron.show``; the program is in tools/show.py."""

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

from dtron.runtime.exit import run_cli
from dtron.tools.show import main

if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
