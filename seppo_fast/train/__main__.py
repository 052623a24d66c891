"""`python -m seppo_fast.train` runs the command line's `train`."""

import sys

from seppo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
