"""Look inside models: `deepspeed launch/analyze.py --model FOLDER ... [--baseline FOLDER] --train_file FILE`."""

import sys

from scale_prune.commands.analyze import main

if __name__ == "__main__":
    main(sys.argv[1:])
