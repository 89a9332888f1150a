"""Prune a causal language model while it is fine-tuned: `deepspeed launch/prune.py --ds_config ... [flags]`."""

import sys

from scale_prune.commands.prune import main

if __name__ == "__main__":
    main(sys.argv[1:])
