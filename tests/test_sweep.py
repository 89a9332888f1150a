"""Sweeps: the grid that a recipe makes, what it refuses, and real processes that are interrupted and started again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import BATCH, BLOCK, ROOT, errors_of, make_work, report_of, wait_until
from outcomes import outcome_of

from scale_prune.commands.sweep import main
from scale_prune.study.cells import read_sweep
from scale_prune.system.exits import STOPPED

# In place of a launcher and the run behind it. Seed 1 takes long and saves itself on SIGTERM, seed 2 can fail.
STANDS_IN = """
import json, signal, sys, time
from pathlib import Path
import yaml

recipe = Path(sys.argv[sys.argv.index("--config") + 1])
settings = yaml.safe_load(recipe.read_text())
folder = Path(settings["output_dir"])
folder.mkdir(exist_ok=True)

def save(*_):
    time.sleep(0.5)
    (folder / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
if settings["seed"] == 2 and (folder.parent / "broken").exists():
    print((folder.parent / "broken").read_text())
    sys.exit(2)
(folder / "recipe.yaml").touch()
if settings["seed"] == 1 and "--resume" not in sys.argv:
    time.sleep(60)
report = {"seconds": {"total": 120.0}, "started": "--resume" in sys.argv, "launched": sys.argv[1]}
(folder / "report.json").write_text(json.dumps(report))
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def write(folder: Path, **lines: Any) -> Path:
    recipe = folder / "sweep.yaml"
    recipe.write_text(yaml.safe_dump({"output_dir": str(folder / "sweep"), **lines}, sort_keys=False))
    return recipe


def names(folder: Path, **lines: Any) -> list[str]:
    return [cell.name for cell in read_sweep(str(write(folder, **lines)))]


outcome = partial(outcome_of, main)


@pytest.fixture
def signals() -> Iterator[None]:
    """Put the handlers of signals back that a sweep in this process sets."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


# --- the grid --------------------------------------------------------------------------------------------------------


def test_lists_make_their_product_and_the_rest_is_common(tmp_path: Path) -> None:
    recipe = write(tmp_path, max_steps=9, criterion=["gum", "random"], remaining=[0.5, 0.25, 0.75], seed=[0, 1])
    cells = read_sweep(str(recipe))
    found = [
        (cell.config.pruning.criterion, cell.config.pruning.remaining, cell.config.training.seed) for cell in cells
    ]
    assert found == [(c, r, s) for c in ("gum", "random") for r in (0.5, 0.25, 0.75) for s in (0, 1)]
    assert {cell.config.training.max_steps for cell in cells} == {9}
    assert cells[0].name == "gum-remaining_0.5-seed_0"
    assert len({cell.name for cell in cells}) == 12
    assert all(cell.settings["output_dir"] == str(tmp_path / "sweep" / cell.name) for cell in cells)


def test_cells_hold_what_belongs_together(tmp_path: Path) -> None:
    cells = [{"criterion": "movement", "scope": ["global", "per_group"]}, {"criterion": "random", "remaining": 1.0}]
    assert names(tmp_path, seed=[0, 1], remaining=0.5, cells=cells) == [
        "movement-global-remaining_0.5-seed_0",
        "movement-per_group-remaining_0.5-seed_0",
        "movement-global-remaining_0.5-seed_1",
        "movement-per_group-remaining_0.5-seed_1",
        "random-remaining_1-seed_0",
        "random-remaining_1-seed_1",
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({}, ["run"]),
        ({"criterion": "gum", "scope": ["global", "per_group"]}, ["gum-global", "gum-per_group"]),
        ({"seed": [3]}, ["seed_3"]),
        ({"learning-rate": [1e-3, 5e-5]}, ["learning_rate_0.001", "learning_rate_5e-05"]),
        ({"model": ["/a/small", "/a/big one"]}, ["model_small", "model_big_one"]),
        ({"model": ["/a/base", "/b/base"]}, ["model__a_base", "model__b_base"]),
        ({"teacher": [None, "self"]}, ["run", "teacher_self"]),
        ({"gradient_checkpointing": [True, False]}, ["gradient_checkpointing_true", "gradient_checkpointing_false"]),
        ({"max_parameters": [10, 20]}, ["max_parameters_10", "max_parameters_20"]),
        ({"max_flops": [10, 20]}, ["max_flops_10", "max_flops_20"]),
        ({"latency_target": [0.5, 0.7]}, ["latency_target_0.5", "latency_target_0.7"]),
    ],
)
def test_a_cell_is_named_after_what_differs(lines: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    assert names(tmp_path, **lines) == expected


def test_names_stay_as_lists_grow(tmp_path: Path) -> None:
    before = names(tmp_path, remaining=[0.5], learning_rate=[1e-3, 1e-4], seed=[0])
    after = names(tmp_path, remaining=[0.5, 0.25], learning_rate=[1e-3, 1e-4], seed=[0, 1])
    assert before == ["remaining_0.5-learning_rate_0.001-seed_0", "remaining_0.5-learning_rate_0.0001-seed_0"]
    assert set(before) < set(after)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"criterium": "gum"}, "has the unknown key criterium, did you mean criterion?"),
    ({"cell": []}, "has the unknown key cell, did you mean cells?"),
    ({"cells": [{"sed": 1}]}, "has the unknown key sed, did you mean seed?"),
    ({"seed": []}, "seed is an empty list"),
    ({"cells": []}, "cells is an empty list"),
    ({"cells": [{"seed": []}]}, "seed is an empty list"),
    ({"cells": {"seed": 1}}, "cells must be a list of mappings"),
    ({"seed": [0, "one"]}, "`seed: 'one'` is not valid, it must be a whole number"),
    ({"seed": [[0, 1]]}, "`seed: [0, 1]` is not valid, it must be a whole number"),
    ({"remaining": [0.5, 1.5]}, "cell remaining_1.5: --remaining 1.5 is out of range"),
    ({"criterion": ["gum", "gums"]}, "cell gums: --criterion gums is unknown"),
    ({"layout": "uniform", "criterion": ["random", "gum"]}, "cell gum: --layout uniform cannot hold the widths"),
    ({"criterion": ["gum", "movement"], "uniqueness": 3.0}, "cell movement: --uniqueness 3.0 does nothing under"),
    ({"seed": [1, 1]}, "two cells are the same run, seed_1"),
    ({"cells": [{"criterion": "gum"}, {"criterion": "gum", "scope": "global"}]}, "the same run, gum and gum-global"),
    ({"cells": [{"seed": 1}, {"seed": 1, "log_every": 5}]}, "two cells are the same run, "),
    ({"output_dir": ["a", "b"]}, "output_dir is ['a', 'b'], it must be one text"),
    ({"cells": [{"output_dir": "a"}]}, "has output_dir: the cells' folders are made in"),
    ({"overwrite": True}, "has overwrite: a sweep leaves finished cells"),
    ({"resume": "newest"}, "has resume: a sweep goes on"),
]


@pytest.mark.parametrize(("lines", "expected"), BAD, ids=[expected for _, expected in BAD])
def test_a_mistake_is_one_message_before_anything_runs(lines: dict[str, Any], expected: str, tmp_path: Path) -> None:
    code, stderr = outcome(write(tmp_path, **lines), "--launcher", "python")
    assert code == 2
    (error,) = errors_of(stderr)
    assert expected in error
    assert "--config" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_file_of_another_is_not_taken_for_a_cells_recipe(tmp_path: Path) -> None:
    recipe, theirs = write(tmp_path, seed=[0]), tmp_path / "sweep" / "seed_0.yaml"
    theirs.parent.mkdir()
    for text in ("seed: 3\n", "- not\n- a recipe\n", "output_dir: out\n"):
        theirs.write_text(text)
        code, stderr = outcome(recipe, "--launcher", "python")
        assert code == 2
        assert f"{theirs} would be written for cell seed_0, but is another file already" in stderr
        assert theirs.read_text() == text


def test_a_launcher_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    code, stderr = outcome(write(tmp_path), "--launcher", "depspeed --num_accelerators 2")
    assert code == 2
    assert "--launcher depspeed --num_accelerators 2 is not a command" in stderr
    assert not (tmp_path / "sweep").exists()


def test_the_example_is_a_sweep() -> None:
    cells = read_sweep(str(ROOT / "launch" / "recipes" / "sweep-criteria.yaml"))
    assert len(cells) == 39
    assert sum(cell.config.pruning.remaining == 1.0 for cell in cells) == 3


# --- the runs, in real processes -------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    """Return a sweep's arguments: three cells, and a launcher that stands in for the runs."""
    (tmp_path / "stand_in.py").write_text(STANDS_IN)
    return [str(write(tmp_path, seed=[0, 1, 2])), "--launcher", f"{sys.executable} {tmp_path / 'stand_in.py'}"]


def start(argv: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_an_interrupted_sweep_goes_on_with_what_is_missing(
    sweep: list[str], tmp_path: Path, signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    process = start(sweep)
    wait_until(lambda: (folder / "seed_1" / "recipe.yaml").exists())
    code, stderr = outcome(*sweep)
    assert code == 2, "two sweeps in one folder"
    assert "has a sweep at work in it" in stderr
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == STOPPED, said
    assert (folder / "seed_1" / "saved").exists(), "the sweep has waited for the run"
    assert said.splitlines() == [
        "runs seed_0, cell 1 of 3; 3 left, no time known yet",
        "runs seed_1, cell 2 of 3; 2 left, about 4 min",
        "stopped with 2 of 3 cells left; the same command goes on",
    ]
    first = (folder / "seed_0" / "report.json").stat().st_mtime_ns
    capsys.readouterr()
    assert outcome(*sweep, "--list")[0] == 0
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert states == ["done", "begun", "to", "1"]
    assert outcome(*sweep)[0] == 0
    assert capsys.readouterr().out.splitlines() == [
        "goes on with seed_1, cell 2 of 3; 2 left, about 4 min",
        "runs seed_2, cell 3 of 3; 1 left, about 2 min",
        f"all 3 cells are done; `scale-prune compare {folder}` compares them",
    ]
    assert (folder / "seed_0" / "report.json").stat().st_mtime_ns == first
    assert [report_of(folder / f"seed_{seed}")["started"] for seed in range(3)] == [False, True, False]
    assert report_of(folder / "seed_0")["launched"] == str(ROOT / "scale_prune" / "commands" / "__main__.py")


# As DeepSpeed's and torch's: whoever tells it to end has its ranks killed soon after.
IMPATIENT = """
import os, signal, subprocess, sys

own = sys.argv.pop(1) == "own"  # as torch's, which gives ranks sessions of their own
rank = subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | {"LOCAL_RANK": "0"}, start_new_session=own)

def kill(*_):
    rank.kill()
    sys.exit(1)

signal.signal(signal.SIGTERM, kill)
sys.exit(rank.wait())
"""


@pytest.mark.parametrize("session", ["shared", "own"])
def test_a_run_saves_itself_though_its_launcher_would_not_wait(session: str, sweep: list[str], tmp_path: Path) -> None:
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    launcher = f"{sys.executable} {tmp_path / 'impatient.py'} {session} {tmp_path / 'stand_in.py'}"
    process = start([sweep[0], "--launcher", launcher])
    wait_until(lambda: (tmp_path / "sweep" / "seed_1" / "recipe.yaml").exists())
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == STOPPED, said
    assert (tmp_path / "sweep" / "seed_1" / "saved").exists()


def test_a_killed_sweep_keeps_others_away_from_the_run_it_leaves(sweep: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    process = start(sweep)
    wait_until(lambda: (folder / "seed_1" / "recipe.yaml").exists())
    (left,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(folder / "seed_1.yaml") in path.read_text().split("\0")
    ]
    process.kill()
    process.communicate()
    code, stderr = outcome(*sweep)
    assert code == 2
    assert "or a run that outlived one" in stderr
    os.kill(left, signal.SIGTERM)
    wait_until((folder / "seed_1" / "saved").exists)


def test_a_cell_that_fails_does_not_stop_the_others(
    sweep: list[str], tmp_path: Path, signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "broken").write_text("error: it is broken")
    write(tmp_path, seed=[2, 3])
    assert outcome(*sweep)[0] == 1
    reason = f"error: it is broken; see {folder / 'seed_2.log'}"
    assert capsys.readouterr().out.splitlines() == [
        "runs seed_2, cell 1 of 2; 2 left, no time known yet",
        f"failed: seed_2, exit code 2; {reason}",
        "runs seed_3, cell 2 of 2; 1 left, no time known yet",
        "1 of 2 cells failed; the same command tries them again:",
        f"  seed_2: {reason}",
    ]
    (folder / "broken").write_text("Killed")
    assert outcome(*sweep)[0] == 1
    assert f"failed: seed_2, exit code 2; see {folder / 'seed_2.log'}" in capsys.readouterr().out.splitlines()
    (folder / "broken").unlink()
    assert outcome(*sweep)[0] == 0


def test_a_finished_or_begun_cell_is_not_taken_for_one_of_other_settings(
    sweep: list[str], tmp_path: Path, signals: None
) -> None:
    write(tmp_path, seed=[0])
    assert outcome(*sweep)[0] == 0
    write(tmp_path, seed=[0, 3], log_every=7)
    assert outcome(*sweep)[0] == 0
    write(tmp_path, seed=[0, 3], max_steps=7)
    code, stderr = outcome(*sweep)
    assert code == 2
    assert "seed_0 is finished and was run with max_steps 300, the recipe now has 7" in stderr
    write(tmp_path, seed=[0, 3], gradient_checkpointing=True)
    assert "the recipe now has True" in outcome(*sweep, "--list")[1], "which could be another batch"
    write(tmp_path, seed=[0, 3], max_steps=7)
    (tmp_path / "sweep" / "seed_0" / "report.json").unlink()
    code, stderr = outcome(*sweep)
    assert code == 2
    assert "seed_0 is begun and was run with max_steps 300, the recipe now has 7" in stderr
    write(tmp_path, seed=[0], ds_config="zero3")
    assert outcome(*sweep, "--list")[0] == 0, "where a begun cell finds things may change"
    write(tmp_path, seed=[0, 3])
    (tmp_path / "sweep" / "seed_0" / "recipe.yaml").write_text("criterion: gum\nwarmup_fraction: 0.0\n")
    code, stderr = outcome(*sweep)
    assert code == 2, "a default that has changed since"
    assert "seed_0 is begun and was run with criterion gum, the recipe now has kfac" in stderr


@pytest.mark.slow
def test_how_a_batch_is_cut_up_may_change_where_its_size_is_given(
    sweep: list[str], tmp_path: Path, signals: None
) -> None:
    write(tmp_path, seed=[0], train_batch_size=6)
    assert outcome(*sweep)[0] == 0
    write(tmp_path, seed=[0, 1], train_batch_size=6, micro_batch_size=1, gradient_checkpointing=True)
    assert outcome(*sweep)[0] == 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["python", "deepspeed --num_accelerators 2 --master_port {port}"])
def test_real_runs_that_are_interrupted_end_with_all_reports(launcher: str, tmp_path: Path) -> None:
    work, folder = make_work(tmp_path), tmp_path / "sweep"
    texts = {f"{split}_file": str(work / f"{split}.txt") for split in ("train", "validation")}
    size = {"block_size": BLOCK, "train_batch_size": BATCH, "max_steps": 150, "tensorboard": False}
    lines = {"model": str(work / "model"), "criterion": ["random", "magnitude", "sensitivity"]}
    argv = [str(write(tmp_path, **texts, **size, **lines)), "--launcher", launcher.format(port=free_port())]
    process = start(argv)
    wait_until((folder / "magnitude" / "recipe.yaml").exists, timeout=120)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED, said
    assert not (folder / "magnitude" / "report.json").exists(), "it was too fast to be interrupted"
    assert "stopped by SIGTERM after step" in (folder / "magnitude.log").read_text()
    again = start(argv)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert re.findall(r"^(\w[\w ]*?) (\w+), cell", said, flags=re.MULTILINE) == [
        ("goes on with", "magnitude"),
        ("runs", "sensitivity"),
    ]
    reports = {name: report_of(folder / name) for name in ("random", "magnitude", "sensitivity")}
    assert len(reports["magnitude"]["resumed_at"]) == 1
    assert [reports[name]["resumed_at"] for name in ("random", "sensitivity")] == [[], []]
    compare = [sys.executable, str(ROOT / "launch" / "compare.py"), str(folder), "--output_dir", str(tmp_path / "all")]
    subprocess.run(compare, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    rows = json.loads((tmp_path / "all" / "comparison.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"random", "magnitude", "sensitivity"}
