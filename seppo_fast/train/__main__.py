"""Runs `seppo-fast train` as `python -m seppo_fast.train`, for `accelerate launch -m`."""

import sys

from seppo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
