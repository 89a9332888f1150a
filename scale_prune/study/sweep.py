"""The command that runs a grid of settings, one ordinary run after the other: `launch/sweep.py RECIPE.yaml`.

Restartable: finished cells are skipped, an interrupted one goes on from its newest checkpoint.
"""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean

import yaml

from scale_prune.study.cells import Cell
from scale_prune.system import STOPPED, StopSignal, write_atomically

PROGRAM = Path(__file__).resolve().parents[1] / "commands" / "__main__.py"
"""A file, not a module's name: each launcher has another flag for modules."""

LOCK = ".sweep.lock"
PATIENCE = 3600.0
"""Seconds that ranks have to save themselves before their launcher is told, which kills what hangs."""


def run_all(cells: Sequence[Cell], launcher: Sequence[str]) -> int:
    """Run the cells that are not done, one after the other; a cell that fails does not stop the others.

    Args:
        cells: all cells of the sweep.
        launcher: the words before the program.

    Returns:
        the exit code: 0, 1 where cells failed, STOPPED after SIGINT or SIGTERM.

    Raises:
        ValueError: another sweep is at work in the folder.
    """
    stop = StopSignal((signal.SIGINT, signal.SIGTERM))
    failed: dict[str, str] = {}
    with locked(cells[0].folder.parent) as lock:
        todo = [cell for cell in cells if not cell.is_done]
        for place, cell in enumerate(todo):
            if stop.received:
                break
            verb = "goes on with" if cell.is_begun else "runs"
            _say(f"{verb} {cell.name}, cell {cells.index(cell) + 1} of {len(cells)}; {time_left(cells, todo[place:])}")
            logged = cell.log.stat().st_size if cell.log.is_file() else 0
            code = run(cell, launcher, stop, lock)
            if not cell.is_done and not stop.received:
                failed[cell.name] = _reason(cell.log, logged)
                _say(f"failed: {cell.name}, exit code {code}; {failed[cell.name]}")
    return _ending(cells, failed, stopped=stop.received)


def run(cell: Cell, launcher: Sequence[str], stop: StopSignal, lock: int) -> int:
    """Run one cell to its end, or until it is stopped and has saved itself; return its exit code.

    Args:
        cell: which one.
        launcher: the words before the program.
        stop: tells when to pass SIGTERM on.
        lock: descriptor of the lock, which the run holds too, so that no sweep disturbs a run that outlived its own.
    """
    recipe = yaml.safe_dump(cell.settings, sort_keys=False)
    write_atomically(cell.recipe, recipe)
    command = [*launcher, str(PROGRAM), "prune", "--config", str(cell.recipe), *(["--resume"] if cell.is_begun else [])]
    with cell.log.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C at the terminal reaches the sweep alone, which then tells the run once
            pass_fds=(lock,),
        )
        while process.poll() is None and not stop.received:
            time.sleep(0.2)
        _end(process)
    return process.returncode


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Make the sweep's folder and keep other sweeps out of it.

    Raises:
        ValueError: another sweep, or a run that an earlier one has left, is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} has a sweep at work in it, or a run that outlived one; wait, or end it"
            ) from None
        yield file.fileno()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell what is left of a run to end, and wait: launchers may end before the ranks have saved.

    The ranks are told first, and alone: DeepSpeed's and torch's launchers kill them 30 seconds after they are told.
    """
    ranks, patience = set(filter(_is_rank, _processes_of(process.pid))), time.monotonic() + PATIENCE
    for rank in ranks:
        with suppress(ProcessLookupError):  # it may end at this moment
            os.kill(rank, signal.SIGTERM)
    while ranks & _living().keys() and time.monotonic() < patience:
        time.sleep(0.2)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    while process.poll() is None or _processes_of(process.pid):
        time.sleep(0.2)


def _processes_of(leader: int) -> set[int]:
    """Return the living processes of a group, and all that come from them: torch gives ranks groups of their own."""
    living = _living()
    found = {process for process, (_, group) in living.items() if group == leader}
    while more := {process for process, (parent, _) in living.items() if parent in found} - found:
        found |= more
    return found


def _living() -> dict[int, tuple[int, int]]:
    """Return parent and group of all processes but the dead that nobody has asked after."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, group = path.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if state not in "ZX":
            found[int(path.parent.name)] = int(parent), int(group)
    return found


def _is_rank(process: int) -> bool:
    """Tell whether a launcher has started a process as a rank."""
    try:
        return b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{process}/environ").read_bytes()
    except OSError:  # it has ended
        return False


def time_left(cells: Sequence[Cell], left: Sequence[Cell]) -> str:
    """Say how many cells are left, and how long they take if each takes what the finished ones took on average."""
    if not left:
        return "none left"
    seconds = [cell.seconds for cell in cells if cell.is_done]
    return f"{len(left)} left, " + (f"about {_duration(len(left) * mean(seconds))}" if seconds else "no time known yet")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _reason(log: Path, start: int) -> str:
    """Return the last message of a log behind its first `start` bytes, which are of earlier attempts, and its path."""
    lines = log.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
    said = next((f"{line}; " for line in reversed(lines) if line.startswith("error:")), "")
    return f"{said}see {log}"


def _ending(cells: Sequence[Cell], failed: Mapping[str, str], *, stopped: bool) -> int:
    """Say how the sweep has ended and why cells have failed, by name, and return its exit code."""
    folder, left = cells[0].folder.parent, sum(not cell.is_done for cell in cells)
    if stopped and left:
        _say(f"stopped with {left} of {len(cells)} cells left; the same command goes on")
        return STOPPED
    if failed:
        _say(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again:")
        for name, reason in failed.items():
            _say(f"  {name}: {reason}")
        return 1
    _say(f"all {len(cells)} cells are done; `scale-prune compare {folder}` compares them")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
