"""The batch script for Slurm, with stand-ins for Slurm's own commands, which are not here; the run in it is real."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from command import ROOT, arguments, make_work, report_of, wait_until

from scale_prune.checkpoint.folder import newest_first
from scale_prune.system.exits import STOPPED

pytestmark = pytest.mark.distributed

JOB = "77"
RUNNING: list[subprocess.Popen[str]] = []
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@"
code=$?
exit "${SRUN_TELLS:-$code}"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" != show ] || echo 127.0.0.1
[ "$1" != requeue ] || echo "$2" >> "$REQUEUED"
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """Return a project folder without an environment of its own; a job leaves nothing there but when it has started."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("launch", "scale_prune"):
        (folder / name).symlink_to(ROOT / name)
    yield folder
    while RUNNING:
        with suppress(ProcessLookupError):  # the job and all that it has started
            os.killpg(RUNNING.pop().pid, signal.SIGKILL)
    assert {path.name for path in folder.iterdir()} <= {"launch", "scale_prune", "out", f".started-{JOB}"}


def slurm(project: Path) -> dict[str, str]:
    """Return the environment of a job of one node with two devices."""
    folder = project.parent
    commands = folder / "bin"
    commands.mkdir()
    for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(content)
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "node", "SLURM_GPUS_ON_NODE": "2", "SLURM_NODEID": "0"}
    paths = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | job | {"SLURM_SUBMIT_DIR": str(project), "PATH": paths, "REQUEUED": str(folder / "requeued")}


def submit(environment: dict[str, str], flags: list[str]) -> subprocess.Popen[str]:
    job = subprocess.Popen(
        ["bash", "launch/slurm.sbatch", *flags],
        cwd=environment["SLURM_SUBMIT_DIR"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    RUNNING.append(job)
    return job


@pytest.mark.faults
@pytest.mark.parametrize("told", [STOPPED, 137])  # srun has killed the launcher of another node meanwhile
def test_a_job_that_is_warned_queues_itself_again_and_goes_on(told: int, project: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    environment, output = slurm(project), tmp_path / "out"
    flags = arguments(make_work(tmp_path / "work"), output, max_steps=2000)
    job = submit(environment | {"SRUN_TELLS": str(told)}, flags)
    wait_until(lambda: (output / "recipe.yaml").exists())
    time.sleep(5)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == told, said
    assert (tmp_path / "requeued").read_text() == f"{JOB}\n"
    step = int(newest_first(output)[0].name.removeprefix("step-"))
    again = submit(environment, [*flags, "--max_steps", str(step + 2)])
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert report_of(output)["resumed_at"] == [step]
    assert (tmp_path / "requeued").read_text() == f"{JOB}\n"


@pytest.mark.parametrize("in_recipe", [False, True])
@pytest.mark.parametrize(("setting", "goes_on"), [("", True), ("overwrite: true", False), ("resume: /other", False)])
def test_a_job_goes_on_with_what_it_has_saved_itself(
    setting: str, goes_on: bool, in_recipe: bool, project: Path, tmp_path: Path
) -> None:
    environment, recipe, output = slurm(project), tmp_path / "recipe.yaml", tmp_path / "the output"
    (tmp_path / "bin" / "srun").write_text('#!/usr/bin/env bash\necho "${@: -1}"\nexit 143\n')
    recipe.write_text(f"seed: 1\n{setting}\noutput_dir : '{output}' # shared\n" if in_recipe else "seed: 1\n")
    words = {"": [], "overwrite: true": ["--overwrite"], "resume: /other": ["--resume", "/other"]}[setting]
    given = [] if in_recipe else [*words, "--output_dir", str(output)]
    checkpoints = output / "checkpoints"
    (checkpoints / "step-00000009").mkdir(parents=True)
    (output / "recipe.yaml").touch()
    for old in (checkpoints / "step-00000009", output / "recipe.yaml"):  # of another run
        os.utime(old, (1e9, 1e9))
    restarts = itertools.count()

    def added() -> str:
        """Return the last word of the next start, where it is not one that was given."""
        count = {"SLURM_RESTART_COUNT": str(next(restarts))}
        said, _ = submit(environment | count, [*given, "--config", str(recipe)]).communicate(timeout=20)
        return "" if said.strip() == str(recipe) else said.strip()

    before = "--resume" if goes_on else ""
    assert added() == before
    (checkpoints / "step-00000004.partial").mkdir()
    assert added() == before
    (output / "recipe.yaml").touch()
    assert added() == (before if "resume" not in setting else "--overwrite"), (
        "PATH again, in the place of what it began"
    )
    (checkpoints / "step-00000004").mkdir()
    assert added() == "--resume"
    (checkpoints / "step-00000004").rmdir()
    (output / "report.json").touch()
    assert added() == "--resume", "complete"
    (project / f".started-{JOB}").unlink()  # never made, as where Slurm queued the job again before it began
    assert added() == before


@pytest.mark.parametrize(("ended_with", "again"), [(76, True), (250, True), (2, False), (1, False)])
def test_a_lost_contact_is_known_where_srun_tells_of_the_launchers_that_it_killed(
    ended_with: int, again: bool, project: Path, tmp_path: Path
) -> None:
    environment = slurm(project) | {"SRUN_TELLS": "143"}
    (tmp_path / "bin" / "deepspeed").write_text(f"#!/usr/bin/env bash\nexit {ended_with}\n")
    (tmp_path / "bin" / "deepspeed").chmod(0o755)
    job = submit(environment, [])
    said, _ = job.communicate(timeout=20)
    assert job.returncode == 143, said
    assert (tmp_path / "requeued").exists() == again
    assert (project / f".started-{JOB}").exists(), (
        "srun tells of the launchers, and Slurm itself may queue the job again"
    )


def test_a_job_that_is_canceled_stays_so(project: Path, tmp_path: Path) -> None:
    environment = slurm(project)
    (tmp_path / "bin" / "srun").write_text('#!/usr/bin/env bash\ntouch "$REQUEUED.started"\nexec sleep 60\n')
    job = submit(environment, ["--help"])
    wait_until((tmp_path / "requeued.started").exists)
    os.killpg(job.pid, signal.SIGTERM)  # as scancel does, to all that runs
    job.communicate(timeout=20)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("told", "restarts", "seconds", "again"),
    [(76, 4, 0, True), (76, 5, 0, False), (76, 5, 900, True), (250, 0, 0, True), (134, 0, 0, True), (2, 0, 0, False)],
)
def test_a_job_that_fails_alike_each_time_stops(
    told: int, restarts: int, seconds: int, again: bool, project: Path, tmp_path: Path
) -> None:
    how = {"SLURM_RESTART_COUNT": str(restarts), "SECONDS": str(seconds)}  # bash counts on from there
    environment = slurm(project) | how
    (tmp_path / "bin" / "srun").write_text(f"#!/usr/bin/env bash\nexit {told}\n")
    job = submit(environment, ["--help"])
    said, _ = job.communicate(timeout=20)
    assert job.returncode == told, said
    assert (tmp_path / "requeued").exists() == again
