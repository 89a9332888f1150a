"""Writing a checkpoint: all ranks fill a folder that has its name only once everything is on the disk."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scale_prune.checkpoint.folder import (
    FOLDER,
    FORMAT,
    MANIFEST,
    NAME,
    STATE,
    abandon,
    newest_first,
    problems_of_ranks,
    sha256,
)
from scale_prune.core import FlatSlice
from scale_prune.system import appears, sync, write_atomically
from scale_prune.system.slices import portions, write_slices
from scale_prune.zero3 import Runtime

FILE_BYTES = 2**30
PATIENCE = 60.0  # seconds that a shared disk may take to show a file to another node


def save(
    output: Path, *, state: dict[str, Any], slices: Iterable[tuple[str, FlatSlice]], runtime: Runtime, keep: int
) -> Path:
    """Write a checkpoint and remove the oldest ones. A collective.

    Args:
        output: the run's folder, on a disk that all ranks see.
        state: what is the same on all ranks, for JSON; "step" is the number of steps that were made.
        slices: this rank's slices; taken one at a time, FILE_BYTES of them are held at once.
        runtime: the ranks.
        keep: newest checkpoints that stay, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a rank cannot write, e.g. because the disk is full; the earlier checkpoints are as they were.
    """
    folder = output / FOLDER / f"step-{state['step']:08d}"
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        _together("begin", lambda: _begin(partial), runtime, folder, main_only=True)
        _together("write", lambda: _write_own(partial, runtime.rank, slices), runtime, folder)
        _together(
            "finish", lambda: _finish(partial, folder, state, runtime.world_size), runtime, folder, main_only=True
        )
    except ValueError:
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if runtime.is_main:
        for old in newest_first(output)[keep:]:
            with suppress(OSError):  # somebody reads it; what is left of it goes with the next one
                _remove(old)
    return folder


def _begin(partial: Path) -> None:
    """Make the folder to write into, and remove what was left of others."""
    for leftover in partial.parent.glob("*.partial"):
        if re.fullmatch(NAME, leftover.stem):
            shutil.rmtree(leftover, ignore_errors=leftover != partial)
    partial.mkdir(parents=True)


def _finish(partial: Path, folder: Path, state: dict[str, Any], world_size: int) -> None:
    """Write state and manifest beside what all ranks have written, and make the whole visible."""
    write_atomically(partial / STATE, json.dumps(state))  # with NaN and Infinity, as perplexities may be
    files = {STATE: _entry(partial / STATE)}
    for rank in range(world_size):
        files |= _sums_of(partial, rank)
    write_atomically(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    sync(partial)
    if os.path.lexists(folder):  # no run comes to a step twice, so it is not of this one
        abandon(folder)
    partial.rename(folder)
    sync(folder.parent)


def _write_own(partial: Path, rank: int, slices: Iterable[tuple[str, FlatSlice]]) -> None:
    entries = {}
    for number, portion in enumerate(portions(slices, FILE_BYTES)):
        path = partial / f"rank-{rank:05d}-{number:04d}.safetensors"
        write_slices(path, portion)
        sync(path)
        entries[path.name] = _entry(path)
    write_atomically(partial / f"rank-{rank:05d}.json", json.dumps(entries))


def _sums_of(partial: Path, rank: int) -> dict[str, Any]:
    """Return what a rank says of its files, and remove the note."""
    note = partial / f"rank-{rank:05d}.json"
    if not appears(note, PATIENCE):
        raise FileNotFoundError(f"{note} of rank {rank} is not on the disk that rank 0 sees")
    entries: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    note.unlink()
    return entries


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _remove(folder: Path) -> None:
    """Remove a checkpoint; it is invisible before the first of its files is gone."""
    partial = folder.with_name(f"{folder.name}.partial")
    folder.rename(partial)
    shutil.rmtree(partial)


def _together(what: str, work: Callable[[], None], runtime: Runtime, folder: Path, *, main_only: bool = False) -> None:
    """Do a part of the writing, on rank 0 or on all; if it fails anywhere, all ranks raise."""
    own = work if runtime.is_main or not main_only else lambda: None
    failed = {rank: problem for rank, problem in enumerate(problems_of_ranks(own)) if problem}
    if failed:
        rank, problem = next(iter(failed.items()))
        whole = ", ".join(path.name for path in newest_first(folder.parents[1])) or "none"
        raise ValueError(
            f"checkpoint {folder} cannot be written, rank {rank} fails to {what}: {problem}; all ranks need to see one "
            f"--output_dir with free space. Earlier checkpoints are as they were: {whole}"
        )
