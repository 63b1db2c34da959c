"""``python -m dtron.profile``; the program is in tools/profile.py."""

import sys

from dtron.runtime.exit import run_cli
from dtron.tools.profile import main

if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
