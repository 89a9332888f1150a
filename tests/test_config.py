"""Every range that the help states is enforced, and the message says what is valid."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest

from scale_prune.config.setting import Range, describe
from scale_prune.config.settings import Config, concerns

SPECS: list[Field[Any]] = [spec for concern in concerns().values() for spec in fields(concern)]
NAN, INFINITY = float("nan"), float("inf")

OUT_OF_RANGE = [
    ("block_size", 1, "at least 2"),
    ("eval_tokens", -1, "at least 0"),
    ("remaining", 0.0, "in (0, 1]"),
    ("remaining", 1.5, "in (0, 1]"),
    ("remaining", NAN, "in (0, 1]"),
    ("warmup_fraction", -0.1, "in [0, 1)"),
    ("warmup_fraction", 1.0, "in [0, 1)"),
    ("cooldown_fraction", -0.1, "in [0, 1)"),
    ("cooldown_fraction", 1.0, "in [0, 1)"),
    ("update_every", 0, "at least 1"),
    ("score_learning_rate", 0.0, "above 0"),
    ("score_learning_rate", INFINITY, "above 0"),
    ("regularization", -1e-9, "at least 0"),
    ("uniqueness", -1.0, "at least 0"),
    ("uniqueness", INFINITY, "at least 0"),
    ("similarity_every", 0, "at least 1"),
    ("similarity_tokens", 1, "in [2, 1000000]"),
    ("similarity_weight", 0.0, "in (0, 1]"),
    ("similarity_weight", 1.1, "in (0, 1]"),
    ("min_kept", 0, "at least 1"),
    ("width_multiple", 0, "at least 1"),
    ("rounds", -1, "at least 0"),
    ("repair_damping", -0.1, "at least 0"),
    ("calibration_tokens", 0, "at least 1"),
    ("initial_rank", 0, "at least 1"),
    ("embedding_clusters", 0, "at least 1"),
    ("gate_learning_rate", 0.0, "above 0"),
    ("lambda_learning_rate", 0.0, "above 0"),
    ("target_warmup_fraction", 1.1, "in [0, 1]"),
    ("initial_drop_rate", 0.0, "in (0, 1)"),
    ("initial_drop_rate", 1.0, "in (0, 1)"),
    ("gate_l1", -0.1, "at least 0"),
    ("max_steps", -1, "at least 0"),
    ("max_parameters", 0, "at least 1"),
    ("max_flops", 0, "at least 1"),
    ("latency_target", 1.0, "in (0, 1)"),
    ("recovery_steps", -1, "at least 0"),
    ("train_batch_size", 0, "in [1, 1000000]"),
    ("micro_batch_size", 0, "in [1, 1000000]"),
    ("gradient_accumulation_steps", 0, "in [1, 1000000]"),
    ("learning_rate", 0.0, "above 0"),
    ("learning_rate", NAN, "above 0"),
    ("weight_decay", -0.1, "at least 0"),
    ("lr_warmup_fraction", -0.1, "in [0, 1)"),
    ("lr_warmup_fraction", 1.0, "in [0, 1)"),
    ("max_grad_norm", -1.0, "at least 0"),
    ("seed", -1, "in [0, 4294967295]"),
    ("seed", 2**32, "in [0, 4294967295]"),
    ("distill_alpha", 0.0, "in (0, 1]"),
    ("distill_temperature", 0.0, "above 0"),
    ("eval_every", -1, "at least 0"),
    ("log_every", 0, "at least 1"),
    ("collective_timeout", 0.0, "in (0, 31536000]"),
    ("save_every", -1, "at least 0"),
    ("keep_checkpoints", 0, "at least 1"),
    ("eval_examples", -1, "at least 0"),
    ("max_new_tokens", 0, "at least 1"),
    ("num_beams", 0, "at least 1"),
    ("generation_batch_size", 0, "in [1, 1000000]"),
]
AT_THE_EDGE = [
    ("block_size", 2),
    ("remaining", 1.0),
    ("warmup_fraction", 0.0),
    ("similarity_weight", 1.0),
    ("max_grad_norm", 0.0),
    ("uniqueness", 0.0),
    ("seed", 2**32 - 1),
    ("min_kept", 1),
]


@pytest.mark.parametrize(("name", "value", "valid"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_quoted_with_the_range(name: str, value: float, valid: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--{name} {value} is out of range, it must be {valid}")):
        Config.from_flat({name: value})


def test_the_table_covers_every_number() -> None:
    numbers = {spec.name for spec in SPECS if "int" in str(spec.type) or "float" in str(spec.type)}
    assert {name for name, _, _ in OUT_OF_RANGE} == numbers


@pytest.mark.parametrize(("name", "value"), AT_THE_EDGE)
def test_the_ends_of_a_range_belong_to_it_where_help_says_so(name: str, value: float) -> None:
    assert Config.from_flat({name: value}).flat()[name] == value


@pytest.mark.parametrize(
    ("values", "piece"),
    [
        ({"scope": "local"}, "--scope local is unknown, choose one of global, per_group"),
        ({"score_optimizer": "lion"}, "choose one of adam, sgd"),
        ({"similarity": "all"}, "choose one of batch, running"),
        ({"precision": "int8"}, "choose one of fp32, bf16, fp16"),
        ({"layout": "ragged"}, "choose one of auto, uniform, pad, per_layer"),
        ({"output_dir": ""}, '--output_dir "" is empty'),
        ({"max_steps": None}, "--max_steps has no value, leave it out to take its default, 300"),
        ({"eval_tokens": 1}, "--eval_tokens 1 predicts nothing"),
        ({"dataset_config": "wikitext-2"}, "--dataset_config wikitext-2 belongs to a --dataset"),
        ({"warmup_fraction": 0.6, "cooldown_fraction": 0.5}, "--warmup_fraction 0.6 and --cooldown_fraction 0.5"),
        ({"warmup_fraction": 0.8}, "--cooldown_fraction 0.3 leave no steps"),
        ({"targets": "mlp,heads"}, "--targets mlp,heads is not valid, give some of mlp, attention, embedding"),
        ({"targets": "mlp,mlp"}, "--targets mlp,mlp is not valid, give some of mlp, attention, embedding, each once"),
        ({"max_step": 3, "b": 1}, "unknown settings: b, max_step"),
    ],
)
def test_values_that_do_not_fit_are_refused(values: dict[str, Any], piece: str) -> None:
    with pytest.raises(ValueError, match=re.escape(piece)):
        Config.from_flat(values)


@pytest.mark.parametrize("percent", range(1, 100))
def test_fractions_that_fill_all_steps_are_accepted(percent: int) -> None:
    """Hundredths that add up to 1 do so in floating point too."""
    Config.from_flat({"warmup_fraction": percent / 100, "cooldown_fraction": (100 - percent) / 100})


def test_flat_and_from_flat_are_inverse() -> None:
    config = Config.from_flat({"remaining": 0.25, "dataset": "text.txt", "layout": "pad", "seed": 7})
    assert Config.from_flat(config.flat()) == config
    assert (config.pruning.remaining, config.data.dataset, config.output.layout) == (0.25, "text.txt", "pad")


def test_no_two_concerns_share_a_name() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS) == len(Config().flat())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_setting_says_what_it_is_and_its_default(spec: Field[Any]) -> None:
    help, *_, default = describe(spec).split("; ")
    assert len(help.split()) >= 3
    assert default.startswith("default: ")
    assert default != "default: None"


@pytest.mark.parametrize(
    ("valid", "words", "inside", "outside"),
    [
        (Range(0), "at least 0", [0, 5], [-1, INFINITY, NAN]),
        (Range(0, ends="()"), "above 0", [1e-30], [0, INFINITY, NAN]),
        (Range(0, 1, "(]"), "in (0, 1]", [0.5, 1], [0, 1.01, NAN]),
        (Range(0, 1, "[)"), "in [0, 1)", [0, 0.99], [-0.01, 1]),
    ],
)
def test_range(valid: Range, words: str, inside: list[float], outside: list[float]) -> None:
    assert str(valid) == words
    assert all(value in valid for value in inside)
    assert not any(value in valid for value in outside)


MADE_UP = """\
    made_up: int = setting(
        "a made-up number", 3, Range(1), may_change=True, compared=IGNORED, commands=("evaluate",)
    )
"""
USED = """\
from scale_prune.config import Config, IGNORED, parse, settings_where
from scale_prune.commands import evaluate
from scale_prune.study.rows import NO_METHOD

assert parse(["--made_up", "5"], criteria=())[0].output.made_up == 5
assert Config().flat()["made_up"] == 3
assert all("made_up" in settings_where(*nature) for nature in (("may_change", True), ("commands", "evaluate")))
assert "made_up" in NO_METHOD
for wrong in (["--made_up", "0"], ["--made_up", "x"]):
    try:
        parse(wrong, criteria=())
    except ValueError as error:
        assert "--made_up" in str(error)
    else:
        raise AssertionError(wrong)
try:
    evaluate.main(["--help"])
except SystemExit:
    pass
"""


def test_a_setting_is_declared_in_one_file(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "scale_prune", tmp_path / "scale_prune")
    file, before = tmp_path / "scale_prune" / "config" / "settings.py", "    tensorboard: bool = output_setting("
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1
    file.write_text(text.replace(before, MADE_UP + before), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", USED],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a made-up number; at least 1; default: 3" in done.stdout
