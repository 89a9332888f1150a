"""The command that runs a grid of settings."""

import argparse
import os
import shlex
import shutil
from collections.abc import Sequence

from scale_prune.config import parse_some, settings_where, user_errors
from scale_prune.study.cells import Cell, read_sweep
from scale_prune.study.sweep import run_all, time_left

DESCRIPTION = "Run a grid of settings, one ordinary run a cell; start it again to go on where it was interrupted."


def main(argv: Sequence[str]) -> None:
    """Run `launch/sweep.py`; the exit code is 1 where cells failed, 75 where it was stopped, 2 for a user's mistake."""
    with user_errors(rank=0):
        config, _, own = parse_some(argv, settings_where("commands", "sweep"), DESCRIPTION, add_own)
        try:
            cells = read_sweep(own.recipe, config.training.plugin)
        except ValueError as error:  # of a run it is the flag --config that names the file
            raise ValueError(str(error).replace(f"--config {own.recipe}", own.recipe)) from error
        if own.list:
            print(listing(cells))
            return
        launcher = shlex.split(own.launcher)
        if not launcher or shutil.which(launcher[0]) is None:
            raise ValueError(f"--launcher {own.launcher} is not a command that can be found")
        raise SystemExit(run_all(cells, launcher))


def add_own(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    add = parser.add_argument
    add("recipe", type=os.path.expanduser, metavar="RECIPE", help="YAML file of settings, lists are axes of the grid")
    add("--launcher", default="deepspeed", help="what starts the runs, up to the program; default: deepspeed")
    add("--list", action="store_true", help="print the cells, and which are done; run nothing")


def listing(cells: Sequence[Cell]) -> str:
    """Return a line for each cell, and one for all."""
    left = [cell for cell in cells if not cell.is_done]
    lines = [f"{_state(cell):5}  {cell.folder}" for cell in cells]
    return "\n".join([*lines, f"{len(cells) - len(left)} of {len(cells)} done; {time_left(cells, left)}"])


def _state(cell: Cell) -> str:
    if cell.is_done:
        return "done"
    return "begun" if cell.is_begun else "to do"
