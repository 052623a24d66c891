"""`python -m seppo_fast`: the command line."""

import sys

from seppo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
