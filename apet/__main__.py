"""The command line as a module: ``python -m apet COMMAND``."""

import sys

from apet.cli import main

if __name__ == "__main__":
    sys.exit(main())
