"""The command that looks inside models: `launch/analyze.py --model FOLDER [FOLDER ...] [--baseline FOLDER]`."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

from scale_prune.config import load_plugins, parse_some, said_once, settings_where, user_errors
from scale_prune.data import Inputs, check_tokens, prepare
from scale_prune.inspection import (
    GroupAnalysis,
    Sampling,
    add_models,
    analyze,
    as_json,
    draw_all,
    positive,
    read_models,
)
from scale_prune.inspection.analysis_tables import as_table
from scale_prune.system import check_new, check_writable, complete_or_absent, json_text
from scale_prune.zero3 import Runtime, check_launcher, joined, launched_as

DESCRIPTION = "Measure how sensitive the loss is to each MLP neuron of a model, and how much neurons repeat each other."
KEPT = "kept.json"


def main(argv: Sequence[str]) -> None:
    """Run `launch/analyze.py`; a user's mistake ends in one message a host and exit code 2."""
    rank, world_size = launched_as()
    with user_errors(rank):
        with said_once(speaks=rank == 0):
            config, explicit, own = parse_some(argv, settings_where("commands", "analyze"), DESCRIPTION, add_own)
        check_launcher()
        load_plugins(config.training.plugin)
        folder = Path(own.output_dir)
        check_new(folder, f"--output_dir {folder}")
        check_writable(folder.resolve().parent, f"--output_dir {folder}")
        inputs = read_models(own, config, explicit, world_size, "train", needs_groups=True)
        kept = _kept(inputs)
        with joined(rank) as runtime:
            found = {name: _analyzed(each, own, runtime) for name, each in inputs.items()}
            if runtime.is_main:
                _write(folder, found, inputs, kept, own)


def add_own(parser: argparse.ArgumentParser) -> None:
    """Add the command's own flags."""
    add_models(parser)
    parser.add_argument("--batches", type=positive, default=32, help="batches of training text; default: 32")
    parser.add_argument(
        "--sample_units",
        type=partial(positive, least=2),
        metavar="INT",
        help="neurons of each layer that are compared with all others, which bounds memory; default: all",
    )
    parser.add_argument(
        "--sample_tokens",
        type=positive,
        metavar="INT",
        help="tokens of each batch, over all ranks, whose activations are compared; default: all",
    )
    output_dir = "new folder for the results; default: analysis"
    parser.add_argument("--output_dir", type=expanduser, default="analysis", help=output_dir)


def _analyzed(inputs: Inputs, own: argparse.Namespace, runtime: Runtime) -> list[GroupAnalysis]:
    with runtime.main_first():
        blocks = prepare(inputs.config.data, "train", inputs.tokenizer)
    check_tokens({"train": int(blocks.all_tokens.max())}, inputs)
    runtime.say(f"{inputs.config.training.model}: {own.batches} batches of {inputs.batch_size} blocks")
    return analyze(inputs, blocks, own.batches, runtime, Sampling(own.sample_units, own.sample_tokens))


def _write(
    folder: Path,
    found: dict[str, list[GroupAnalysis]],
    inputs: dict[str, Inputs],
    kept: dict[str, Any],
    own: argparse.Namespace,
) -> None:
    """Print the table; write it, analysis.json and the figures."""
    baseline = next(iter(found)) if own.baseline else None
    table = as_table(found, baseline) + _said(own)
    print(f"\n{table}")
    with complete_or_absent(folder) as partial:
        sampled = {"sample_units": own.sample_units, "sample_tokens": own.sample_tokens}
        bos = {"bos": {name: each.begins_with_bos for name, each in inputs.items()}}
        (partial / "analysis.json").write_text(json_text(as_json(found, baseline) | sampled | bos), encoding="utf-8")
        (partial / "table.md").write_text(table, encoding="utf-8")
        draw_all(partial, found, baseline, _of_same_groups(kept, found, baseline))
    print(f"{folder}: analysis.json, table.md and figures")


def _said(own: argparse.Namespace) -> str:
    """Say below the table what was sampled."""
    notes = []
    if own.sample_units:
        notes += [
            f"Neighbors and uniqueness: of {own.sample_units} neurons a layer, each compared with the whole layer."
        ]
    if own.sample_tokens:
        notes += [f"Activations: of {own.sample_tokens} tokens a batch."]
    return "\n" + " ".join(notes) + "\n" if notes else ""


def _kept(inputs: dict[str, Inputs]) -> dict[str, Any]:
    """Return which neurons a run kept, for models that lie in the folder of a run.

    Raises:
        ValueError: what a run has left of it is not JSON.
    """
    files = {name: Path(str(each.config.training.model)).resolve().parent / KEPT for name, each in inputs.items()}
    kept = {}
    for name, file in files.items():
        try:
            if file.is_file():
                kept[name] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON; mend it, or move it away") from error
    return kept


def _of_same_groups(
    kept: dict[str, Any], found: dict[str, list[GroupAnalysis]], baseline: str | None
) -> dict[str, Any]:
    """Leave out the baseline, runs that began with another model, and units that are no neurons."""
    sizes = {group.name: len(group.sensitivity) for group in found[baseline]} if baseline is not None else {}

    def fits(indices: Any) -> bool:
        if not sizes or not isinstance(indices, dict) or not sizes.keys() <= indices.keys():
            return False
        pairs = [(indices[name], range(size)) for name, size in sizes.items()]
        return all(isinstance(each, list) and all(i in units for i in each) for each, units in pairs)

    fitting = {name: indices for name, indices in kept.items() if name != baseline and fits(indices)}
    return {name: {group: indices[group] for group in sizes} for name, indices in fitting.items()}
