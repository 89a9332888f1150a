"""Files and folders that appear complete or not at all, and the files by which a run's folder is known."""

import glob
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

RECIPE = "recipe.yaml"
REPORT = "report.json"
UNFINISHED = ".unfinished-scale_prune"  # in a folder that is being written


def name_beside(path: Path, what: str) -> Path:
    """Return a name beside a path that is nobody's: `NAME.WHAT-` and eight random hexadecimal digits."""
    return path.with_name(f"{path.name}.{what}-{token_hex(4)}")


def is_set_aside(name: str, before: str = "") -> bool:
    """Tell whether a folder's name is one of `name_beside(folder, "replaced")`, of any folder or of that name."""
    return re.fullmatch(rf"{re.escape(before) or '.+'}\.replaced-[0-9a-f]{{8}}", name) is not None


@contextmanager
def whole_or_absent(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """Give a file to write that takes the place of `path` on success and is gone on failure.

    Args:
        path: the file.
        alone: no other process writes it now, so that what killed ones have left of it goes.
    """
    for left in path.parent.iterdir() if alone else ():
        if re.fullmatch(rf"{re.escape(path.name)}\.partial-[0-9a-f]{{8}}", left.name):
            left.unlink(missing_ok=True)
    partial = name_beside(path, "partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_new(folder: Path, asked: str = "") -> None:
    """Refuse a folder whose name a finished result cannot take.

    Args:
        folder: the folder, there or not.
        asked: what the message calls it; "" for its path.

    Raises:
        ValueError: it holds something, is a file, a link to nothing or a mount point.
    """
    asked = asked or str(folder)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        what = "holds something" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{asked} {what}; give a new or empty folder")
    if os.path.ismount(folder.resolve()):
        raise ValueError(f"{asked} is a mount point, whose name a finished result cannot take; give a folder below it")


def check_writable(folder: Path, asked: str) -> None:
    """Refuse a folder that can neither be written nor made.

    Args:
        folder: the folder, there or not.
        asked: what the message calls that which is to be made in it.

    Raises:
        ValueError: what exists of its path is not a folder, or cannot be written.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "cannot be written" if above.is_dir() else "is not a folder"
        raise ValueError(f"{asked} cannot be made: {above} {what}")


@contextmanager
def complete_or_absent(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a folder to write into that takes its name on success and is gone on failure.

    Args:
        folder: the folder to make; its parents are made too. Of a link, what it leads to.
        replace: a folder of this name goes when the new one is complete.

    Yields:
        A folder beside it. At the end of the `with` block it is flushed to disk and renamed in one step.

    Raises:
        ValueError: as `check_new`, where it is not to be replaced.
    """
    if not replace:
        check_new(folder)
    folder = folder.resolve()  # no folder can be renamed to a link
    for mark in folder.parent.glob(f"{glob.escape(folder.name)}.partial-*/{UNFINISHED}"):
        shutil.rmtree(mark.parent, ignore_errors=True)  # of a process that was killed
    partial, replaced = name_beside(folder, "partial"), name_beside(folder, "replaced")
    partial.mkdir(parents=True)
    (partial / UNFINISHED).touch()
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        (partial / UNFINISHED).unlink()
        with back_on_failure(replaced, folder):
            if replace and folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def back_on_failure(aside: Path, folder: Path) -> Iterator[None]:
    """Give a folder that the body has set aside its name back, unless the body has put another in its place."""
    try:
        yield
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise


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


def write_atomically(path: Path, text: str) -> None:
    """Write a text that is there as a whole or not at all."""
    with whole_or_absent(path) as partial:
        partial.write_text(text, encoding="utf-8")
