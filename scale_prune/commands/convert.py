"""The command that writes a model in another layout: `launch/convert.py FOLDER --to FORM --output DEST`."""

import argparse
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from scale_prune.config import load_plugins, parse_some, settings_where, user_errors
from scale_prune.export import FORMS, GGUF_TYPES, convert, open_folder

DESCRIPTION = "Write a model in another layout, tensor by tensor: no GPU, and no code of its folder runs."


def main(argv: Sequence[str]) -> None:
    """Run `launch/convert.py`; a user's mistake ends in one message and exit code 2."""
    with user_errors(rank=0):
        config, _, own = parse_some(argv, settings_where("commands", "convert"), DESCRIPTION, add_own)
        load_plugins(config.training.plugin)
        if own.dtype is not None and own.to != "gguf":
            raise ValueError(f"--dtype {own.dtype} is for --to gguf; a folder of --to {own.to} keeps its types")
        stored = open_folder(Path(own.model))
        notes = convert(stored, own.to, Path(own.output), dtype=own.dtype)
        widths = [group.num_units for group in stored.groups if group.kind == "neuron"]
        print(f"{own.output}: {'; '.join([_widths(widths), *notes])}")


def add_own(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    parser.add_argument("model", type=expanduser, metavar="FOLDER", help="a model's folder, pruned or dense")
    parser.add_argument("--to", choices=FORMS, required=True, help="the layout")
    parser.add_argument(
        "--output", type=expanduser, required=True, metavar="DEST", help="new folder, of gguf the new file"
    )
    parser.add_argument("--dtype", choices=GGUF_TYPES, help="of matrices in gguf; default: the folder's")


def _widths(widths: Sequence[int]) -> str:
    if len(set(widths)) == 1:
        return f"{widths[0]} neurons a layer"
    return f"{min(widths)} to {max(widths)} neurons a layer"
