"""Flags and recipes become settings; whatever is wrong becomes one sentence."""

import errno
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scale_prune.commands import analyze, compare, evaluate, sweep
from scale_prune.config.command_line import parse, parse_some, user_errors
from scale_prune.config.settings import Config
from scale_prune.study.cells import read_sweep

CRITERIA = ("gum", "movement", "random")
ROOT = Path(__file__).resolve().parents[1]


def settings(argv: list[str]) -> dict[str, Any]:
    config, explicit = parse(argv, criteria=CRITERIA)
    return {name: value for name, value in config.flat().items() if name in explicit}


def message(argv: list[str]) -> str:
    with pytest.raises(ValueError, match=r"\w") as error:
        parse(argv, criteria=CRITERIA)
    return str(error.value)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--remaining", "0.25"], {"remaining": 0.25}),
        (["--remaining=1"], {"remaining": 1.0}),
        (["--learning_rate", "1e-4", "--max_steps", "7"], {"learning_rate": 1e-4, "max_steps": 7}),
        (["--max_steps", "400"], {"max_steps": 400}),
        (["--max_steps", "1", "--max_steps", "2"], {"max_steps": 2}),
        (["--overwrite", "--no-tensorboard"], {"overwrite": True, "tensorboard": False}),
        (["--criterion", "movement", "--scope", "per_group"], {"criterion": "movement", "scope": "per_group"}),
        (["--regularization", "3"], {"regularization": 3.0}),
        (["--local_rank", "1", "--seed", "3"], {"seed": 3}),
        (["--local_rank=1"], {}),
        (["--local-rank=0", "--seed=3"], {"seed": 3}),
    ],
)
def test_flags_become_settings_and_are_known_as_given(argv: list[str], expected: dict[str, Any]) -> None:
    assert settings(argv) == expected
    assert {name: type(value) for name, value in settings(argv).items()} == {k: type(v) for k, v in expected.items()}


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ("dataset", "train_file", "validation_file", "ds_config", "model", "teacher", "output_dir", "resume")
    home = dict.fromkeys(paths, str(tmp_path / "x"))
    assert settings([f"--{name}=~/x" for name in paths]) == home
    (tmp_path / "recipe.yaml").write_text("".join(f"{name}: ~/x\n" for name in paths))
    assert settings(["--config=~/recipe.yaml"]) == home
    assert settings(["--model=~no_such_user/x", "--text_column=~"]) == {"model": "~no_such_user/x", "text_column": "~"}
    for command, words, names in [
        (analyze, ["--model", "~/x", "~/x", "--baseline=~/x", "--output_dir=~/x"], ("model", "baseline", "output_dir")),
        (evaluate, ["--model=~/x", "--output=~/x", "--lm_eval_include=~/x"], ("model", "output", "lm_eval_include")),
        (compare, ["~/x", "--output_dir=~/x"], ("runs", "output_dir")),
        (sweep, ["~/x"], ("recipe",)),
    ]:
        own = parse_some(words, (), "", command.add_own)[2]
        for name in names:
            found = getattr(own, name)
            assert {*([found] if isinstance(found, str) else found)} == {home["model"]}
    (tmp_path / "sweep.yaml").write_text("output_dir: ~/x\nseed: [1, 2]\n")
    assert read_sweep(str(tmp_path / "sweep.yaml"))[0].folder.parent == tmp_path / "x"


def test_without_flags_every_setting_is_its_default() -> None:
    assert parse([], criteria=CRITERIA) == (Config(), frozenset())


@pytest.mark.parametrize(
    ("argv", "piece"),
    [
        (["--remainin", "0.5"], "unknown flag --remainin, did you mean --remaining?"),
        (["--max-steps=5"], "unknown flag --max-steps, did you mean --max_steps?"),
        (["--no-tensorbord"], "did you mean --no-tensorboard?"),
        (["--xyzzy"], "unknown flag --xyzzy, --help lists all"),
        (["--remain", "0.5"], "unknown flag --remain, did you mean --remaining?"),
        (["-remaining", "0.5"], "unknown flag -remaining, did you mean --remaining?"),
        (["text.txt"], "unexpected argument 'text.txt'"),
        (["--deepspeed", "zero3.json"], "--ds_config FILE"),
        (["--deepspeed_config=zero3.json"], "--ds_config FILE"),
        (["--max_steps", "ten"], "--max_steps ten is not valid, it must be a whole number"),
        (["--max_steps", "1.5"], "--max_steps 1.5 is not valid, it must be a whole number"),
        (["--remaining", "half"], "--remaining half is not valid, it must be a number"),
        (["--remaining"], "--remaining: expected one argument"),
        (["--remaining", "1.5"], "--remaining 1.5 is out of range, it must be in (0, 1]"),
        (["--learning_rate", "nan"], "--learning_rate nan is out of range"),
        (["--criterion", "gumm"], "--criterion gumm is unknown, choose one of gum, movement, random"),
        (["--layout", "ragged"], "--layout ragged is unknown, choose one of auto, uniform, pad, per_layer"),
        (["--warmup_fraction", "0.9"], "--warmup_fraction 0.9 and --cooldown_fraction 0.3"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(argv: list[str], piece: str) -> None:
    assert piece in message(argv)
    assert "\n" not in message(argv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("remaining: 0.25\nmax-steps: 7\n", {"remaining": 0.25, "max_steps": 7}),
        ("learning_rate: 1e-4  # YAML 1.1 would read a text\n", {"learning_rate": 1e-4}),
        ("remaining: 1\nregularization: 2\n", {"remaining": 1.0, "regularization": 2.0}),
        ("tensorboard: false\nmodel: null\n", {"tensorboard": False}),
        ("dataset: 'true'\n", {"dataset": "true"}),
    ],
)
def test_a_recipe_becomes_settings(recipe: Path, text: str, expected: dict[str, Any]) -> None:
    recipe.write_text(text)
    assert settings(["--config", str(recipe)]) == expected


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(recipe: Path) -> None:
    recipe.write_text("remaining: 0.25\nmax_steps: 7\noverwrite: true\n")
    found = settings(["--config", str(recipe), "--max_steps", "9", "--no-overwrite"])
    assert found == {"remaining": 0.25, "max_steps": 9, "overwrite": False}


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("remainin: 0.5\n", "has the unknown key remainin, did you mean remaining?"),
        ("config: other.yaml\n", "has the unknown key config"),
        ("pruning: {remaining: 0.5}\n", "has the unknown key pruning"),
        ("max_steps: 1\nmax_steps: 2\n", "line 2 is not valid YAML: the key max_steps is there twice"),
        ("max_steps: 1\nmax-steps: 2\n", "has the key max_steps twice"),
        ("max_steps: [1\n", "line 2 is not valid YAML: expected ',' or ']'"),
        ("- max_steps\n", "holds ['max_steps'], it must hold lines of the form `flag: value`"),
        ("seed: !!python/name:os.system\n", "line 1 is not valid YAML"),
        ("max_steps: 1.5\n", "`max_steps: 1.5` is not valid, it must be a whole number"),
        ("max_steps: true\n", "`max_steps: True` is not valid, it must be a whole number"),
        ("max_steps: null\n", "`max_steps: None` is not valid, it must be a whole number"),
        ("remaining: '0.5'\n", "`remaining: '0.5'` is not valid, it must be a number"),
        ("tensorboard: 1\n", "`tensorboard: 1` is not valid, it must be true or false"),
        ("dataset_config: 2024\n", "`dataset_config: 2024` is not valid, it must be a text"),
        ("remaining: 1.5\n", "--remaining 1.5 is out of range"),
        ("criterion: gumm\n", "--criterion gumm is unknown"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(recipe: Path, text: str, piece: str) -> None:
    recipe.write_text(text)
    found = message(["--config", str(recipe)])
    assert piece in found
    assert "\n" not in found


def test_a_recipe_that_is_not_text_is_refused(recipe: Path) -> None:
    recipe.write_bytes(b"max_steps: \xff\n")
    assert "is not a YAML text" in message(["--config", str(recipe)])


def test_help_shows_every_flag_with_its_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], criteria=CRITERIA)
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all(f"--{name} " in shown or f"--{name}, " in shown for name in Config().flat())
    assert "--criterion {gum,movement,random}" in shown
    assert "in (0, 1]; default: 0.5" in shown
    assert shown.count("default: ") == len(Config().flat())
    assert "local_rank" not in shown


@pytest.mark.parametrize(
    "mistake", [ValueError("no such thing"), FileNotFoundError("no such thing"), PermissionError("no such thing")]
)
@pytest.mark.parametrize(
    ("rank", "local_rank", "shown"),
    [
        (0, "0", "error: no such thing\n"),
        (1, "1", ""),
        (8, "0", f"error: {socket.gethostname()}: no such thing\n"),
        (9, "1", ""),
    ],
)
def test_a_mistake_is_one_message_a_host_and_exit_code_2(
    mistake: Exception,
    rank: int,
    local_rank: str,
    shown: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as stop, user_errors(rank):
        raise mistake
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", shown)


def test_a_full_disk_is_one_message_and_a_broken_one_a_traceback(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop, user_errors(0):
        raise OSError(errno.ENOSPC, "No space left on device", "report.json")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a disk is full: [Errno 28] No space left on device: 'report.json'\n"
    with pytest.raises(OSError, match="Input/output error"), user_errors(0):
        raise OSError(errno.EIO, "Input/output error")


def test_what_is_no_mistake_of_the_user_passes_through() -> None:
    with pytest.raises(RuntimeError, match="a bug"), user_errors(0):
        raise RuntimeError("a bug")
    with user_errors(0):
        pass


@pytest.mark.parametrize(("rank", "variable", "traceback"), [(0, "", False), (0, "1", True), (1, "1", True)])
def test_a_whole_process_shows_the_traceback_only_when_asked(rank: int, variable: str, traceback: bool) -> None:
    code = (
        "from scale_prune.config.command_line import parse, user_errors\n"
        f"with user_errors({rank}):\n    parse(['--remainin', '1'], criteria=['gum'])"
    )
    environment = {"SCALE_PRUNE_TRACEBACK": variable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert ("Traceback" in done.stderr) == traceback
    assert done.stderr.count("error: unknown flag --remainin") == (rank == 0)
