"""The folder that a run writes into: made, gone on in, replaced."""

import os
import shutil
import time
from pathlib import Path

import torch
import yaml

from scale_prune.checkpoint import Checkpoint, set_newer_aside
from scale_prune.config import Config
from scale_prune.folders import RECIPE, REPORT, appears
from scale_prune.report import write_atomically
from scale_prune.zero3 import Runtime


def open_output(config: Config, checkpoint: Checkpoint | None, runtime: Runtime) -> None:
    """Make the output folder, or go on in it. A collective; rank 0 writes.

    Raises:
        ValueError: it cannot be written, or a rank sees another disk there.
    """
    problem = ""
    try:
        if runtime.is_main:
            _prepare(config, checkpoint)
    except OSError as error:
        problem = str(error)
    if problem := runtime.gather_texts(problem)[0]:  # the other ranks have not tried
        raise ValueError(f"--output_dir {config.output.output_dir} cannot be written: {problem}")
    _check_shared(Path(config.output.output_dir), runtime)


def _check_shared(output: Path, runtime: Runtime) -> None:
    """Wait for all ranks, and see that they have one disk under the run's folder. A collective.

    Raises:
        ValueError: a rank does not see what rank 0 writes there.
    """
    number = int(runtime.add_over_ranks(torch.tensor([time.time_ns() if runtime.is_main else 0])))
    mark = output / f".shared-{number}"
    if runtime.is_main:
        mark.touch()
    runtime.barrier()
    blind = [rank for rank, sees in enumerate(runtime.gather_numbers(float(appears(mark, 10.0)))) if not sees]
    if runtime.is_main:
        mark.unlink()
    if blind:
        raise ValueError(
            f"rank {blind[0]} does not see --output_dir {output} as rank 0 does; all ranks write checkpoints "
            "there and load the result from there, so give a folder on a disk that all nodes share"
        )


def _prepare(config: Config, checkpoint: Checkpoint | None) -> None:
    folder = Path(config.output.output_dir)
    if checkpoint is None or folder.resolve() not in checkpoint.folder.resolve().parents:
        _make_output(config)
    else:
        set_newer_aside(folder, checkpoint.step)
        _write_recipe(config)


def check_output(config: Config) -> None:
    """Refuse an output folder that holds something.

    Raises:
        ValueError: the folder holds a run, and neither `overwrite` nor `resume` is on, or it holds something else, or
            it cannot be written.
    """
    folder = Path(config.output.output_dir)
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "cannot be written" if above.is_dir() else "is not a folder"
        raise ValueError(f"--output_dir {folder} cannot be made: {above} {what}")
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be read: {error.strerror}") from error
    if not (folder / RECIPE).is_file():
        raise ValueError(f"--output_dir {folder} holds something that is not a run; give a new or empty folder")
    if not config.output.overwrite and config.checkpoint.resume is None:
        raise ValueError(
            f"--output_dir {folder} holds a run already; give another folder, --resume to go on with it, or "
            "--overwrite to replace it"
        )


def is_complete(config: Config) -> bool:
    """Tell whether the output folder holds a run that has come to its end."""
    return (Path(config.output.output_dir) / REPORT).is_file()


def _make_output(config: Config) -> None:
    """Make the output folder with the run's settings in it; a run that is to be overwritten waits beside as `.old`."""
    folder = Path(config.output.output_dir)
    if is_complete(config):
        shutil.rmtree(_old(folder), ignore_errors=True)
        folder.rename(_old(folder))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_recipe(config)


def _write_recipe(config: Config) -> None:
    """Write the settings into the output folder, as a recipe that starts the same run anew."""
    settings = {name: value for name, value in config.flat().items() if value is not None and name != "resume"}
    write_atomically(Path(config.output.output_dir) / RECIPE, yaml.safe_dump(settings, sort_keys=False))


def drop_old_output(config: Config) -> None:
    """Remove the run that this complete one took the place of."""
    shutil.rmtree(_old(Path(config.output.output_dir)), ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")
