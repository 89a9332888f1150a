"""Compare finished runs: `python launch/compare.py RUN [RUN ...]`, a table and a figure."""

import sys

from scale_prune.commands.compare import main

if __name__ == "__main__":
    main(sys.argv[1:])
