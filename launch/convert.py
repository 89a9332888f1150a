"""Write a model in another layout: `python launch/convert.py FOLDER --to FORM --output DEST`."""

import sys

from scale_prune.commands.convert import main

if __name__ == "__main__":
    main(sys.argv[1:])
