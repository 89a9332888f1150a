"""Ranks are killed at random moments, over and over; what is left at the end is what an undisturbed run leaves."""

import os
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from command import arguments, finish, launch, make_work, outcome, pids_of, report_of, wait_until
from distributed import run_ranks, start_ranks

from scale_prune.checkpoint.folder import newest_first
from scale_prune.run.progress import Progress
from scale_prune.system.exits import STOPPED
from scale_prune.zero3.ranks import launched_as

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

KILLS = 24
EVERY = 20
SETTINGS = {
    "criterion": "gum",
    "remaining": 0.4,
    "similarity_every": 5,
    "max_steps": 1500,
    "recovery_steps": 300,
    "save_every": EVERY,
    "log_every": 100,
}
SEED = 20
RANKS = 2


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@dataclass(frozen=True)
class Kill:
    """One row of the log."""

    who: str
    when: str
    made: int
    saved: int

    def __str__(self) -> str:
        return f"| {self.who} | {self.when} | {self.made} | {self.saved} | {max(0, self.made - self.saved)} |"


def counting(flags: list[str], steps: Path) -> tuple[int, str]:
    """Run the command; rank 0 notes every step that it has made."""
    count_step = Progress.count_step

    def noted(self: Progress, tokens: int, seconds: float) -> None:
        count_step(self, tokens, seconds)
        if launched_as()[0] == 0:
            steps.write_text(str(self.step))

    Progress.count_step = noted  # type: ignore[method-assign]
    return outcome(flags)


def newest_step(output: Path) -> int:
    return next((int(path.name.removeprefix("step-")) for path in newest_first(output)), 0)


def is_saving(output: Path, since: float) -> bool:
    """Tell whether a save has begun since a time; what an earlier kill has left does not count."""
    try:
        return any(path.stat().st_mtime > since for path in (output / "checkpoints").glob("*.partial"))
    except FileNotFoundError:  # it has just got its name
        return False


def moment(rng: random.Random, number: int, output: Path, ranks: list[BaseProcess]) -> str:
    """Wait for a moment to kill at: every third one is during a save, the others are anywhere, starting included."""
    if number % 3 == 2:
        wait_until_saving(output, ranks)
        time.sleep(rng.uniform(0, 0.01))
        return "saving"
    delay = rng.uniform(0, 12)
    time.sleep(delay)
    return f"{delay:.1f} s after its start"


def wait_until_saving(output: Path, ranks: list[BaseProcess]) -> None:
    deadline, started = time.monotonic() + 120, time.time()
    while not is_saving(output, started):
        assert all(rank.is_alive() for rank in ranks)
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def killed(rng: random.Random, ranks: list[BaseProcess]) -> str:
    victims = rng.choice([[0], [1], [0, 1]])
    for rank in victims:
        os.kill(ranks[rank].pid or 0, signal.SIGKILL)
    for process in ranks:
        process.join(90)
        assert process.exitcode is not None, "a rank hangs after another one was killed"
    return " and ".join(f"rank {rank}" for rank in victims)


def test_whatever_is_killed_when_the_run_ends_as_if_nothing_had_happened(work: Path, tmp_path: Path) -> None:
    whole, output, steps = tmp_path / "whole", tmp_path / "killed", tmp_path / "steps"
    assert [code for code, _ in run_ranks(outcome, RANKS, arguments(work, whole, **SETTINGS), timeout=1800)] == [0, 0]
    rng, log = random.Random(SEED), []
    for number in range(KILLS):
        before = newest_step(output)
        steps.write_text("0")
        folder = tmp_path / str(number)
        folder.mkdir()
        ranks = start_ranks(counting, RANKS, folder, arguments(work, output, **SETTINGS, resume=True), steps)
        when = moment(rng, number, output, ranks)
        who = killed(rng, ranks)
        log.append(Kill(who, when, max(int(steps.read_text() or 0), before), newest_step(output)))
        assert before <= log[-1].saved
        assert log[-1].made - log[-1].saved <= EVERY, "more than the steps since the last save is lost"
    write_log(log)
    ranks_at_end = run_ranks(outcome, RANKS, arguments(work, output, **SETTINGS, resume=True), timeout=1800)
    assert [code for code, _ in ranks_at_end] == [0, 0]
    assert len(report_of(output)["resumed_at"]) > 0
    for file in ("kept.json", "scores.safetensors", "pruned/model.safetensors"):
        assert (output / file).read_bytes() == (whole / file).read_bytes(), file
    assert report_of(output)["perplexity"] == report_of(whole)["perplexity"]


def write_log(log: list[Kill]) -> None:
    lines = ["| killed | when | steps made | steps saved | steps lost |", "|---|---|---:|---:|---:|", *map(str, log)]
    print("\n".join(lines))
    if file := os.environ.get("FAULTS_LOG"):
        Path(file).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("target", ["ranks", "launcher of the node", "process group"])
def test_a_warning_saves_the_last_step_whoever_hears_it(target: str, work: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = arguments(work, output, **SETTINGS | {"save_every": 0})
    process = launch(flags)
    wait_until(lambda: (output / "recipe.yaml").exists())
    time.sleep(5)
    if target == "process group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        for pid in pids_of(str(output)) if target == "ranks" else [parent_of(pids_of(str(output))[0])]:
            os.kill(pid, signal.SIGTERM)
    said = finish(process)
    assert "stopped by SIGTERM after step" in said
    assert process.returncode == STOPPED or target != "ranks"
    assert process.returncode != 0
    step = newest_step(output)
    assert step > 0
    again = launch([*flags, "--resume", "--max_steps", str(step + 2), "--recovery_steps", "0"])
    assert f"going on after step {step}" in finish(again)
    assert again.returncode == 0


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
