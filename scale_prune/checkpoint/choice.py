"""Which checkpoint a run goes on from."""

from pathlib import Path
from typing import Any

from scale_prune.checkpoint.folder import NEWEST, Checkpoint, DamagedError, newest_first, newest_whole, open_checkpoint
from scale_prune.checkpoint.folder import damage as damage_of
from scale_prune.config import Config
from scale_prune.zero3 import Runtime

UNSAID = {"bos": "never", "rows": "documents"}
"""What held in runs from before there was the setting."""


def glance(config: Config) -> Checkpoint | None:
    """Return the checkpoint that a run will probably go on from, without reading its tensors or talking to other ranks.

    Raises:
        ValueError: `resume` names a folder that is no checkpoint, or a damaged one.
    """
    wanted = config.checkpoint.resume
    if wanted is None:
        return None
    if wanted != NEWEST:
        try:
            return open_checkpoint(Path(wanted))
        except DamagedError as error:
            raise ValueError(_unusable(wanted, str(error), config)) from error
    for folder in newest_first(Path(config.output.output_dir)):
        try:
            return open_checkpoint(folder)
        except DamagedError:
            continue
    return None


def choose(config: Config, runtime: Runtime) -> Checkpoint | None:
    """Return the checkpoint to go on from, all of whose files were read and compared. A collective.

    Raises:
        ValueError: the one that `resume` names is damaged, or all of the run's are.
    """
    wanted = config.checkpoint.resume
    if wanted is None:
        return None
    if wanted == NEWEST:
        return newest_whole(Path(config.output.output_dir), runtime, say=runtime.say)
    problem = damage_of(Path(wanted), runtime)
    if problem is not None:
        raise ValueError(_unusable(wanted, problem, config))
    return open_checkpoint(Path(wanted))


def _unusable(wanted: str, problem: str, config: Config) -> str:
    others = [str(path) for path in newest_first(Path(config.output.output_dir)) if path != Path(wanted)]
    there = f"{config.output.output_dir} has {', '.join(others)}" if others else "there is no other one"
    return f"--resume {wanted} is not a whole checkpoint: {problem}; {there}"


def filled_from(checkpoint: Checkpoint | None, config: Config) -> Config:
    """Return the settings with the checkpoint's global batch, criterion, BOS and rows, where they leave them open."""
    found: dict[str, Any] = {}
    asked = config.flat()
    if checkpoint is not None and config.training.train_batch_size is None:
        found["train_batch_size"] = checkpoint.state["ds_config"]["train_batch_size"]
    if checkpoint is not None:
        before = UNSAID | checkpoint.state["settings"]
        found |= {name: before[name] for name in (*UNSAID, "criterion") if asked[name] == "auto"}
    return Config.from_flat(asked | found)
