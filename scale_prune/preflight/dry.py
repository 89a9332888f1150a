"""The check before the queue: what a run would do and need, and everything that is wrong with it, in seconds.

One process; no GPU, no weights, no engine, nothing is written. The sections that are printed are those whose inputs
could be read.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scale_prune.config import DEFAULT, Mistakes, parse, precision, said_once
from scale_prune.criteria import AUTO, CRITERIA, freezes, with_defaults
from scale_prune.data import calibration_steps, embedded
from scale_prune.preflight.disk import check_disk
from scale_prune.preflight.dry_checks import EARLY_CHECKS, LATE_CHECKS
from scale_prune.preflight.inputs import CHECKS
from scale_prune.preflight.job import Job
from scale_prune.preflight.reading import Reading
from scale_prune.preflight.rehearsal import Rehearsal, rehearse, seconds_of_passes
from scale_prune.preflight.sections import about_needs, about_run
from scale_prune.preflight.timing import about_time
from scale_prune.pruning import sketch_units

DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dry_run(argv: Sequence[str], world_size: int, *, speaks: bool) -> int:
    """Check a command line, print what its run would need, and list every mistake on stderr.

    Args:
        argv: the arguments, without the program's name.
        world_size: number of ranks that the run would have.
        speaks: False keeps this process silent, where another one prints the same.

    Returns:
        the exit code: 0, or 2 where there is a mistake.
    """
    mistakes = Mistakes()
    with said_once(speaks=speaks):
        config, explicit = parse(argv, criteria=(AUTO, *CRITERIA), noted=mistakes.noted)
    reading = Reading(config=config, explicit=explicit, world_size=world_size)
    if config.training.model is None:
        reading.model_config = embedded.model_config()
    for check in (*EARLY_CHECKS, *CHECKS, *LATE_CHECKS):
        with mistakes.noted():
            check(reading)
    lines = [*about_run(reading)]
    if reading.groups and reading.ds_config:
        shape = _shape(reading)
        try:
            job = _job(reading, rehearse(**shape))
        except RuntimeError as error:  # code that looks at numbers, or a block that is too long
            lines.append(f"memory is not known, the model does not run on fake tensors: {' '.join(str(error).split())}")
        else:
            lines += about_needs(reading, job)
            with mistakes.noted():
                check_disk(reading, job)
                if "--measure" in argv:
                    lines += about_time(reading, job, partial(seconds_of_passes, **shape))
    if speaks:
        print("\n".join(lines))
        for mistake in dict.fromkeys(mistakes):  # two checks may meet the same one
            print(f"error: {mistake}", file=sys.stderr, flush=True)
    return 2 if mistakes else 0


def _shape(reading: Reading) -> dict[str, Any]:
    """Return what a micro batch of the run is, as `rehearse` takes it."""
    training = reading.config.training
    return {
        "model_config": reading.model_config,
        "dtype": DTYPES[precision(reading.ds_config)],
        "batch": int(reading.ds_config["train_micro_batch_size_per_gpu"]),
        "block": reading.config.data.block_size,
        "gradient_checkpointing": training.gradient_checkpointing,
        "trust_remote_code": training.trust_remote_code,
        "prepare": partial(sketch_units, pruning=with_defaults(reading.config.pruning)),
    }


def _job(reading: Reading, shown: Rehearsal) -> Job:
    """Return what the needs follow from."""
    training, ds_config = reading.config.training, reading.ds_config
    pruning = with_defaults(reading.config.pruning)
    has_teacher = reading.config.distillation.teacher is not None
    return Job(
        # The logits of who teaches, and the gradient of the distance to them.
        rehearsed=replace(shown, activations=shown.activations + 2 * shown.logits * (has_teacher or freezes(pruning))),
        recomputes=training.gradient_checkpointing,
        groups=reading.groups,
        pruning=pruning,
        ds_config=ds_config,
        world_size=reading.world_size,
        on_gpu=Path(training.ds_config or DEFAULT).stem != DEFAULT,  # not by this machine, which may be another one
        trains=training.max_steps > 0 and not freezes(pruning),
        recovers=training.recovery_steps > 0,
        calibration_steps=calibration_steps(reading.config, int(ds_config["train_batch_size"])),
        has_teacher=has_teacher,
    )
