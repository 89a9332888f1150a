"""One run from the command line to the report: read, fine-tune and prune, compact, export, measure.

inputs -> sharded model -> engine + pruner -> loop -> smaller engine -> recovery -> pruned/ -> re-load -> report
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from scale_prune.cli import dry_run_ranks, parse, user_errors
from scale_prune.config import Config
from scale_prune.criteria import CRITERIA, check_uniqueness
from scale_prune.dry_run import dry_run
from scale_prune.ds_config import load
from scale_prune.embedded import build
from scale_prune.folders import REPORT
from scale_prune.inputs import fill_in, read_inputs, unused_settings
from scale_prune.output import check_output, drop_replaced, goes_on, is_complete
from scale_prune.ranks import joined, launched_as
from scale_prune.report import write_report
from scale_prune.resume import check_same, choose, filled_from, glance
from scale_prune.run import Run
from scale_prune.stop import StopSignal
from scale_prune.tasks import make_task
from scale_prune.zero3 import Runtime

CACHE = Path(os.environ.get("SCALE_PRUNE_CACHE", Path(__file__).resolve().parents[1] / ".cache"))
BASE = {
    "max_steps": 250,
    "learning_rate": 3e-3,
    "remaining": 1.0,
    "criterion": "random",
    "eval_tokens": 20_000,
}


def main(argv: Sequence[str]) -> None:
    """Run `launch/prune.py`; a user's mistake ends in one message from rank 0 and exit code 2."""
    rank, world_size = launched_as()
    with user_errors(rank):
        ranks = dry_run_ranks(argv, world_size)
        if ranks is not None:
            raise SystemExit(dry_run(argv, ranks, speaks=rank == 0))
        with redirect_stdout(None if rank else sys.stdout):  # --help once, not once a rank
            config, explicit = parse(argv, criteria=tuple(CRITERIA))
        fill_in(config)
        load(config.training.ds_config)
        check_output(config)
        checkpoint = glance(config)
        if goes_on(config) and is_complete(config):
            with redirect_stdout(None if rank else sys.stdout):
                print(f"the run in {config.output.output_dir} is complete, there is nothing to go on with", flush=True)
            return
        if checkpoint is None:
            check_uniqueness(config.pruning)
        if config.training.model is not None:
            inputs = read_inputs(filled_from(checkpoint, config), explicit, world_size)
            if checkpoint is not None:
                check_same(checkpoint, inputs)
        with joined(rank, config.training.collective_timeout) as runtime:
            if config.training.model is None:
                config = embedded_default(config, explicit, runtime)
            prune(config, explicit, runtime)


def embedded_default(config: Config, explicit: frozenset[str], runtime: Runtime) -> Config:
    """Build and train the small model that stands in where the user names none; both are cached.

    Returns:
        The settings with that model, and with its text where the user names none.
    """
    with runtime.main_first():
        folder = build(CACHE)
    base = folder / "base"
    text = {"train_file": str(folder / "train.jsonl"), "validation_file": str(folder / "validation.jsonl")}
    if not (base / REPORT).is_file():
        if runtime.is_main:
            print(f"training the small base model, {BASE['max_steps']} steps; it is kept in {base}", flush=True)
        given = {name: getattr(config.training, name) for name in ("ds_config", "precision")}
        settings = (
            BASE | text | given | {"model": str(folder / "untrained"), "output_dir": str(base), "overwrite": True}
        )
        prune(Config.from_flat(settings), frozenset(), runtime)  # the ds_config wins
        runtime.barrier()
    own_text = config.data.dataset is not None or config.data.train_file is not None
    return Config.from_flat(config.flat() | ({} if own_text else text) | {"model": str(base / "pruned")})


def prune(config: Config, explicit: frozenset[str], runtime: Runtime) -> dict[str, Any]:
    """Fine-tune and prune one model; the report, and everything else, is in the output folder.

    Raises:
        SystemExit: SIGTERM came, and the run is saved; with the code STOPPED.
        ValueError: an input cannot be used, the loss is not finite, or the disk is full.
        RuntimeError: masks did not take hold, or the exported model is not the one that was trained.
    """
    stop = StopSignal()
    checkpoint = choose(config, runtime)
    inputs = read_inputs(filled_from(checkpoint, config), explicit, runtime.world_size)
    config = inputs.config
    if checkpoint is not None:
        for line in check_same(checkpoint, inputs):
            runtime.say(line)
    elif config.checkpoint.resume is not None:
        runtime.say(f"{config.output.output_dir} has no checkpoint yet, so the run starts from the beginning")
    if line := unused_settings(config):
        runtime.say(line)
    task = make_task(inputs, runtime)
    run = Run(task.inputs, runtime, task, checkpoint, stop)
    try:
        report = run.go()
    finally:
        run.monitor.close()  # so that a message does not stand behind the progress bar
    if runtime.is_main:
        write_report(run.folder, report)
        drop_replaced(config)
    return report
