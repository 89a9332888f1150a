"""Run a grid of settings: `python launch/sweep.py RECIPE.yaml --launcher "deepspeed --num_accelerators 2"`."""

import sys

from scale_prune.commands.sweep import main

if __name__ == "__main__":
    main(sys.argv[1:])
