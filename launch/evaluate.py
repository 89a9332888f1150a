"""Measure models: `deepspeed launch/evaluate.py --model FOLDER ... [--baseline FOLDER] --validation_file FILE`."""

import sys

from scale_prune.commands.evaluate import main

if __name__ == "__main__":
    main(sys.argv[1:])
