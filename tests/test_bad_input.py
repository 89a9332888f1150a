"""What the command says to bad input that its libraries would answer with a traceback, or one rank alone would see."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import Case, make_template, read_cases
from command import arguments, errors_of, make_work, outcome
from distributed import run_ranks
from fuzzed_inputs import fuzz_cases
from safetensors.torch import load_file, save_file

from scale_prune.checkpoint.schema import SHAPE, problem_of
from scale_prune.config.ds_config import BUILTIN

pytestmark = pytest.mark.distributed

DS_CONFIGS: list[tuple[str, Any, str]] = [
    ("optimizer.type", "AdamWW", '"optimizer.type": "AdamWW", which is unknown, choose adagrad, adam, adamw'),
    ("optimizer.type", 3, '"optimizer.type": 3, which is unknown'),
    ("optimizer.type", "SGD", '"optimizer.params.torch_adam", which SGD does not know; it takes lr, momentum'),
    ("optimizer.params.learning_rate", 0.1, '"optimizer.params.learning_rate", which AdamW does not know; it takes lr'),
    ("optimizer.params.betas", [-0.9, 0.999], '"optimizer.params.betas": [-0.9, 0.999], it must be two numbers'),
    ("optimizer.params.betas", 0.9, '"optimizer.params.betas": 0.9, it must be two numbers'),
    ("optimizer.params.eps", -1, '"optimizer.params.eps": -1, it must be a number, at least 0'),
    ("optimizer.params.lr", [0.1], '"optimizer.params.lr": [0.1], it must be a number, at least 0'),
    ("optimizer.params.weight_decay", float("nan"), "NaN is not a finite number"),
    (
        "scheduler.type",
        "Warmup",
        '"scheduler.type": "Warmup", which is none of DeepSpeed\'s, choose LRRangeTest,',
    ),
    ("scheduler.type", "Enum", '"scheduler.type": "Enum", which is none of DeepSpeed\'s'),
    ("scheduler.params.warmup_steps", 3, "unexpected keyword argument 'warmup_steps'"),
    (
        "zero_optimization.offload_optimizer",
        "cpu",
        '"zero_optimization.offload_optimizer": "cpu", it must be an object',
    ),
    (
        "zero_optimization.reduce_bucket_size",
        -1,
        '"zero_optimization.reduce_bucket_size": -1, which DeepSpeed does not',
    ),
    ("steps_per_print", 0, '"steps_per_print": 0, it must be a whole number, at least 1'),
    ("wall_clock_breakdown", "x", '"wall_clock_breakdown": "x", it must be true or false'),
    ("data_types", 3, '"data_types": 3, it must be an object'),
    ("checkpoint", {"tag_validation": "x"}, "DeepSpeed cannot read the ds_config: Checkpoint config contains invalid"),
    ("train_micro_batch_size_per_gpu", 10**30, "it must be a whole number in [1, 1000000]"),
]
FLAGS: list[tuple[dict[str, Any], str]] = [
    ({"criterion": "gum\nerror: no"}, "error: --criterion gum error: no is unknown"),
    ({"collective_timeout": 1e300}, "--collective_timeout 1e+300 is out of range"),
    ({"similarity_tokens": 10**30}, "--similarity_tokens 1000000000000000000000000000000 is out of range"),
    ({"config": "huge.yaml"}, "is not valid, it must be a number"),
    ({"ds_config": "nested.json"}, "nested.json is not valid: maximum recursion depth"),
    ({"output_dir": "train.txt/out"}, "train.txt is not a folder"),
    ({"output_dir": "x" * 300}, "cannot be read: File name too long"),
    ({"output_dir": "link"}, "link is not a folder"),
]
MODELS: list[tuple[str, str, str]] = [
    ("model.safetensors", "", "its weights cannot be read: model.safetensors is damaged"),
    ("tokenizer.json", "[]", "its tokenizer cannot be read"),
    ("tokenizer_config.json", "[]", "its tokenizer cannot be read"),
    ("config.json", json.dumps({"model_type": "gpt_neo", "hidden_size": "wide"}), "its model cannot be read"),
    ("config.json", json.dumps({"model_type": "gpt_neo", "hidden_size": -4}), "no model can be built from its config"),
    ("config.json", json.dumps({"model_type": "gpt_neo", "activation_function": "no"}), "no model can be built"),
    (
        "config.json",
        json.dumps({"model_type": "gemma3"}),
        "that part alone, of model type gemma3_text",
    ),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


def outcomes(cases: list[list[str]]) -> list[tuple[int, str]]:
    return [outcome(flags) for flags in cases]


def with_value(path: str, value: Any) -> dict[str, Any]:
    """Return zero3_cpu with one value changed."""
    ds_config: dict[str, Any] = json.loads((BUILTIN / "zero3_cpu.json").read_text())
    *sections, key = path.split(".")
    section = ds_config
    for name in sections:
        section = section[name]
    section[key] = value
    return ds_config


def test_what_a_library_would_answer_with_a_traceback_is_one_message(work: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = []
    for number, (path, value, expected) in enumerate(DS_CONFIGS):
        (work / f"{number}.json").write_text(json.dumps(with_value(path, value)))
        cases.append(({"ds_config": work / f"{number}.json"}, expected))
    (work / "huge.yaml").write_text(f"remaining: {10**400}\n")
    (work / "nested.json").write_text("[" * 100_000)
    (work / "link").symlink_to("nowhere/at/all")
    for settings, expected in FLAGS:
        is_file = ("config", "ds_config", "output_dir")
        cases.append(({name: work / v if name in is_file else v for name, v in settings.items()}, expected))
    for number, (file, content, expected) in enumerate(MODELS):
        model = Path(shutil.copytree(work / "model", work / f"model {number}"))
        (model / file).write_text(content)
        cases.append(({"model": model}, expected))
    flags = [arguments(work, work / "never", **settings) for settings, _ in cases]
    for (_, expected), (code, stderr) in zip(cases, run_ranks(outcomes, 1, flags)[0], strict=True):
        assert code == 2, expected
        (error,) = errors_of(stderr)
        assert expected in error
        assert "Traceback" not in stderr
    assert not (work / "never").exists()


def of_another_shape(tensors: dict[str, Any]) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name][:5].contiguous()


def without_one(tensors: dict[str, Any]) -> None:
    del tensors["transformer.h.1.mlp.c_fc.weight"]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [(of_another_shape, "size mismatch"), (without_one, "1 of them are missing and would be random")],
)
def test_weights_that_do_not_fit_are_found_on_all_ranks(
    spoil: Callable[[dict[str, Any]], None], expected: str, work: Path
) -> None:
    model = Path(shutil.copytree(work / "model", work / spoil.__name__))
    tensors = load_file(model / "model.safetensors")
    spoil(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (code, stderr), (other_code, other_stderr) = run_ranks(outcome, 2, arguments(work, work / "never", model=model))
    assert (code, other_code) == (2, 2)
    (error,) = errors_of(stderr)
    assert f"--model {model}: its weights cannot be loaded: " in error
    assert expected in error
    assert errors_of(other_stderr) == []
    assert not (work / "never").exists()


def test_a_folder_that_only_rank_0_cannot_make_ends_all_ranks(work: Path) -> None:
    if not os.access("/proc", os.W_OK):
        pytest.skip("the folder is refused before the ranks start")
    (code, stderr), (other_code, other_stderr) = run_ranks(outcome, 2, arguments(work, Path("/proc/out")))
    assert (code, other_code) == (2, 2)
    (error,) = errors_of(stderr)
    assert "--output_dir /proc/out cannot be written" in error
    assert errors_of(other_stderr) == []


def whole_state() -> dict[str, Any]:
    state: dict[str, Any] = {}
    for path, kinds in SHAPE.items():
        *sections, key = path.split(".")
        section = state
        for name in sections:
            section = section[name]
        section[key] = kinds[0](1) if kinds[0] in (int, bool, str) else kinds[0]()
    return state


@pytest.mark.parametrize("path", SHAPE)
def test_a_state_without_a_key_or_of_another_type_is_damaged(path: str) -> None:
    assert problem_of(whole_state()) is None
    *sections, key = path.split(".")
    for spoil in (lambda section: section.pop(key), lambda section: section.update({key: b"x"})):
        state = copy.deepcopy(whole_state())
        section = state
        for name in sections:
            section = section[name]
        spoil(section)
        problem = problem_of(state)
        assert problem is not None
        assert f'as "{path}", it must be' in problem


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


class RanksMeetError(Exception):
    """Nothing is wrong that one process can find."""


@pytest.fixture
def spoiled(request: Any, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int | None, str]:
    """Return the exit code and stderr of rank 0 in a spoiled folder, None where it goes on to meet the others."""

    def meet(*args: object) -> None:
        raise RanksMeetError

    folder = Path(shutil.copytree(template, tmp_path / "case"))
    request.param.spoil(folder)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("scale_prune.commands.prune.joined", meet)
    try:
        return outcome(request.param.words)
    except RanksMeetError:
        return None, ""
    finally:
        assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


def listed(cases: Iterable[Case]) -> Any:
    """Run a test on each case: on what comes of it, and on what the message should contain."""
    found = [pytest.param(case, case.says, id=f"{case.kind}: {case.name}"[:60]) for case in cases]
    return pytest.mark.parametrize(("spoiled", "says"), found, indirect=["spoiled"])


@listed(case for case in read_cases() if case.is_found_early)
def test_what_the_table_lists_is_one_message_before_ranks_meet(spoiled: tuple[int | None, str], says: str) -> None:
    code, stderr = spoiled
    assert code == 2
    (error,) = errors_of(stderr)
    assert says in error


@listed(case for case in fuzz_cases(20, seed=0) if case.kind != "checkpoint")
def test_a_random_change_is_one_message_or_none(spoiled: tuple[int | None, str], says: str) -> None:
    code, stderr = spoiled
    assert (code, len(errors_of(stderr))) in ((None, 0), (2, 1))
