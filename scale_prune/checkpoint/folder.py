"""Checkpoints: a folder that is whole or invisible, written by all ranks, read by any number of them; here, read.

    checkpoints/step-00000100/
        rank-00000-0000.safetensors ...   each rank's slices, see scale_prune.system.slices
        state.json                        everything that is the same on all ranks
        manifest.json                     size and SHA-256 of every other file

All ranks write into `step-00000100.partial`; rank 0 renames it when everything is on disk. So all ranks must see one
disk. Nothing is pickled.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_prune.checkpoint.schema import problem_of
from scale_prune.system import name_beside
from scale_prune.system.slices import SliceReader
from scale_prune.zero3 import Runtime, of_all_ranks

FOLDER = "checkpoints"
NEWEST = "newest"
NAME = r"step-\d{8,}"
FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
AT_MOST = 30  # checkpoints that are tried


class DamagedError(ValueError):
    """A checkpoint that cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest and state could be read.

    Attributes:
        folder: where it is.
        state: what was the same on all ranks.
        files: (size in bytes, SHA-256) by name.
    """

    folder: Path
    state: dict[str, Any]
    files: dict[str, tuple[int, str]]

    @property
    def step(self) -> int:
        """Optimizer steps that had been made."""
        return int(self.state["step"])

    @property
    def compacted(self) -> bool:
        """True where the units that were to leave were gone from the model."""
        return bool(self.state.get("finished", self.step > int(self.state["pruner"]["step"])))

    @property
    def kept_groups(self) -> dict[str, int]:
        """The dense model's units by group, where earlier rounds have removed some; else empty."""
        return dict(self.state.get("kept_groups", {}))

    def reader(self) -> SliceReader:
        """Open the slices of all ranks."""
        return SliceReader(sorted(self.folder / name for name in self.files if name.endswith(".safetensors")))


def newest_first(output: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, the one with the most steps first."""
    found = [path for path in (output / FOLDER).glob("step-*") if re.fullmatch(NAME, path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read what a checkpoint says of itself, and see that its files have their sizes; their contents are not read.

    Raises:
        DamagedError: a file is missing, has another size, cannot be read or lies outside the folder, or it is no
            checkpoint at all.
    """
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST} has the format {manifest.get('format')}, this version reads {FORMAT}")
    try:
        files = {name: (int(each["bytes"]), str(each["sha256"])) for name, each in manifest["files"].items()}
        own_state = {STATE: files[STATE]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} does not say which files there are") from error
    for name, (size, _) in files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            raise DamagedError(f"{name} is not a file of its own folder")
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{name} has {path.stat().st_size} bytes, not {size}")
    _check_contents(folder, own_state)
    state = _read_json(folder / STATE)
    if problem := problem_of(state):
        raise DamagedError(f"{STATE} {problem}")
    return Checkpoint(folder, state, files)


def newest_whole(output: Path, runtime: Runtime, say: Callable[[str], None]) -> Checkpoint | None:
    """Return a run's newest checkpoint that is whole, None where there is none. A collective.

    Args:
        output: the run's folder.
        runtime: the ranks; they share the reading of the files, rank 0 decides which checkpoints there are.
        say: is called with a line about each that is damaged.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    names = [path.name for path in newest_first(output)][:AT_MOST]
    problems = []
    for name in of_all_ranks(names)[0]:
        folder = output / FOLDER / name
        problem = damage(folder, runtime)
        if problem is None:
            return open_checkpoint(folder)
        problems.append(f"checkpoint {folder} is damaged: {problem}")
        say(f"{problems[-1]}; trying the one before it")
    if problems:
        raise ValueError(
            f"no checkpoint in {output / FOLDER} is whole, the newest: {problems[0]}; "
            "to start anew, give --overwrite without --resume"
        )
    return None


def damage(folder: Path, runtime: Runtime) -> str | None:
    """Compare all files with the manifest, and return what is wrong with the checkpoint. A collective.

    Every rank reads its part of the files.
    """

    def check() -> None:
        checkpoint = open_checkpoint(folder)
        own = sorted(checkpoint.files.items())[runtime.rank :: runtime.world_size]
        _check_contents(folder, dict(own))

    return next(filter(None, problems_of_ranks(check)), None)


def set_newer_aside(output: Path, step: int) -> None:
    """Rename checkpoints of later steps, which the run that goes on from `step` will not come to as they are."""
    for path in newest_first(output):
        if int(path.name.removeprefix("step-")) > step:
            abandon(path)


def abandon(folder: Path) -> None:
    """Give a checkpoint another name, under which no run goes on from it."""
    aside = folder.with_name(f"{folder.name}.abandoned")
    folder.rename(name_beside(folder, "abandoned") if os.path.lexists(aside) else aside)


def _check_contents(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    for name, (_, expected) in files.items():
        if sha256(folder / name) != expected:
            raise DamagedError(f"the contents of {name} are not what was written")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(f"{path.name} is not valid JSON") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path.name} is not an object")
    return content


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problems_of_ranks(work: Callable[[], None]) -> list[str]:
    """Do this rank's work and return what went wrong with it on every rank, "" where nothing did. A collective."""
    problem = ""
    try:
        work()
    except (OSError, DamagedError) as error:
        problem = str(error)
    return of_all_ranks(problem)
