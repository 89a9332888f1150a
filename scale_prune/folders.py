"""Folders that appear complete or not at all, and the files by which a run's folder is known."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECIPE = "recipe.yaml"
REPORT = "report.json"


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that takes its name on success and is gone on failure.

    Args:
        folder: the folder to make; its parents are made too.

    Yields:
        A folder beside it. At the end of the `with` block it is flushed to disk and renamed in one step.

    Raises:
        ValueError: the folder exists and is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; results go to a new or an empty folder")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def appears(path: Path, patience: float) -> bool:
    """Wait for a file that another node has written; a shared disk may take its time to show it."""
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
