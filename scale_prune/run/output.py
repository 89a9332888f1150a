"""The folder that a run writes into: made, gone on in, replaced."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from scale_prune.checkpoint import Checkpoint, set_newer_aside
from scale_prune.config import Config, as_it_runs
from scale_prune.criteria import freezes
from scale_prune.data import Inputs
from scale_prune.preflight import goes_on, is_empty
from scale_prune.system import (
    RECIPE,
    appears,
    back_on_failure,
    complete_or_absent,
    is_set_aside,
    name_beside,
    write_atomically,
)
from scale_prune.zero3 import Runtime, of_all_ranks

REPLACES = ".replaces"  # names of the folders that a run has set aside


def open_output(inputs: Inputs, checkpoint: Checkpoint | None, runtime: Runtime) -> None:
    """Make the output folder, or go on in it. A collective; rank 0 writes.

    Raises:
        ValueError: it cannot be written, or a rank sees another disk there.
    """
    problem, config = "", inputs.config
    # So that the recipe does not contradict the ds_config where that has decided.
    steps = config.training.recovery_steps + (0 if freezes(config.pruning) else config.training.max_steps)
    config = replace(config, training=as_it_runs(inputs.ds_config, config.training, steps))
    try:
        if runtime.is_main:
            _prepare(config, checkpoint)
    except OSError as error:
        problem = str(error)
    if problem := of_all_ranks(problem)[0]:  # the other ranks have not tried
        raise ValueError(f"--output_dir {config.output.output_dir} cannot be written: {problem}")
    advice = "all ranks write checkpoints there and load the result from there, so give a folder"
    check_shared(Path(config.output.output_dir), runtime, "--output_dir", advice)


def check_shared(folder: Path, runtime: Runtime, name: str, advice: str) -> None:
    """Wait for all ranks, and see that they have one disk under a folder. A collective.

    Args:
        folder: the folder, which rank 0 has.
        runtime: the ranks.
        name: what it is called.
        advice: why it has to be shared, and what to do.

    Raises:
        ValueError: a rank does not see what rank 0 writes there.
    """
    number = int(runtime.add_over_ranks(torch.tensor([time.time_ns() if runtime.is_main else 0])))
    mark = folder / f".shared-{number}"
    if runtime.is_main:
        mark.touch()
    runtime.barrier()
    blind = [rank for rank, sees in enumerate(runtime.gather_numbers(float(appears(mark, 10.0)))) if not sees]
    if runtime.is_main:
        mark.unlink()
    if blind:
        raise ValueError(
            f"rank {blind[0]} does not see {name} {folder} as rank 0 does; {advice} on a disk that all nodes share"
        )


def _prepare(config: Config, checkpoint: Checkpoint | None) -> None:
    folder = Path(config.output.output_dir)
    if not goes_on(config) and not is_empty(folder):
        _replace_output(config, folder.resolve())
        return
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        set_newer_aside(folder, checkpoint.step)
    _write_recipe(config, folder)


def _replace_output(config: Config, folder: Path) -> None:
    """Make the output folder anew; what it holds waits beside it until the run is complete, as what that replaced."""
    aside = name_beside(folder, "replaced")
    with back_on_failure(aside, folder), complete_or_absent(folder, replace=True) as fresh:
        _write_recipe(config, fresh)
        write_atomically(fresh / REPLACES, "\n".join(path.name for path in (aside, *_replaced(folder))))
        folder.rename(aside)


def _write_recipe(config: Config, folder: Path) -> None:
    """Write the settings into the output folder, as a recipe that starts the same run anew."""
    asked_each_time = {"resume": None, "overwrite": False}  # another run may be there then
    settings = {name: value for name, value in (config.flat() | asked_each_time).items() if value is not None}
    write_atomically(folder / RECIPE, yaml.safe_dump(settings, sort_keys=False))


def drop_replaced(config: Config) -> None:
    """Remove the runs that this complete one took the place of, and nothing that it has not set aside itself."""
    folder = Path(config.output.output_dir).resolve()
    for aside in _replaced(folder):
        shutil.rmtree(aside, ignore_errors=True)
    (folder / REPLACES).unlink(missing_ok=True)


def _replaced(folder: Path) -> list[Path]:
    """Return the folders that the run in a folder has set aside; a name that is not of its making does not count."""
    note = folder / REPLACES
    names = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
    return [folder.with_name(name) for name in names if is_set_aside(name, folder.name)]
