"""A ds_config is complete after `resolve`; contradictions and what pruning cannot work with are refused."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from scale_prune.config.command_line import parse
from scale_prune.config.ds_config import BUILTIN, as_it_runs, load, precision, resolve
from scale_prune.config.ds_limits import REFUSED, get
from scale_prune.config.settings import Config
from scale_prune.run.start import slow_precision
from scale_prune.zero3 import ds_check

ROOT = Path(__file__).resolve().parents[1]
CRITERIA = ("gum", "magnitude", "movement", "random", "sensitivity", "soft_movement")
NAMES = sorted(file.stem for file in BUILTIN.glob("*.json"))
# A sweep's recipe is a grid of runs; tests/test_sweep.py has it.
RECIPES = sorted(set((ROOT / "launch" / "recipes").glob("*.yaml")) - set((ROOT / "launch" / "recipes").glob("sweep-*")))
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# What users of Hugging Face's Trainer have: every key that it fills, and no more.
TRAINER: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
        },
    },
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "zero_optimization": {
        "stage": 3,
        "sub_group_size": 1000000000.0,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}
BARE: dict[str, Any] = {"zero_optimization": {"stage": 3}}


def effective_learning_rate(resolved: dict[str, Any]) -> float:
    """Return the peak learning rate of the weights: the scheduler's where it has one, else the optimizer's."""
    paths = ("scheduler.params.warmup_max_lr", "scheduler.params.cycle_max_lr", "optimizer.params.lr")
    rate = next(rate for rate in (get(resolved, path) for path in paths) if rate is not None)
    return float(max(rate)) if isinstance(rate, list) else float(rate)


def resolved(raw: dict[str, Any], world_size: int = 1, hidden_size: int | None = 13, **given: Any) -> dict[str, Any]:
    """Resolve with the settings in `given`, all of them explicit."""
    return resolve(raw, Config.from_flat(given), frozenset(given), world_size, hidden_size)


def changed(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a copy of a ds_config with other values at some paths, whose dots are written as two underscores."""
    raw = copy.deepcopy(raw)
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = raw
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return raw


def batch_of(ds_config: dict[str, Any]) -> tuple[int, ...]:
    return tuple(ds_config[key] for key in BATCH)


def test_auto_is_filled_from_the_flags_under_the_keys_of_the_trainer() -> None:
    given = {"max_steps": 90, "recovery_steps": 10, "lr_warmup_fraction": 0.05, "precision": "bf16"}
    rates = {"learning_rate": 3e-4, "weight_decay": 0.2, "max_grad_norm": 0.7}
    found = resolved(TRAINER, 2, 13, train_batch_size=12, micro_batch_size=3, **given, **rates)
    expected = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.7,
        "optimizer.params": {"lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.2},
        "scheduler.params.total_num_steps": 100,
        "scheduler.params.warmup_num_steps": 5,
        "scheduler.params.warmup_min_lr": 0.0,
        "scheduler.params.warmup_max_lr": 3e-4,
        "bf16.enabled": True,
        "fp16": {"enabled": False, "loss_scale": 0},
        "zero_optimization.sub_group_size": 1e9,
        "zero_optimization.reduce_bucket_size": 169,
        "zero_optimization.stage3_prefetch_bucket_size": 152,
        "zero_optimization.stage3_param_persistence_threshold": 130,
    }
    assert {path: get(found, path) for path in expected} == expected


def test_missing_sections_get_defaults_that_keep_deepspeed_quiet() -> None:
    found = resolved(BARE, hidden_size=None)
    assert found == {
        "zero_optimization": {"stage": 3},
        "optimizer": {
            "type": "AdamW",
            "params": {"torch_adam": True, "lr": 5e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_type": "linear",
                "total_num_steps": 300,
                "warmup_num_steps": 30,
                "warmup_min_lr": 0.0,
                "warmup_max_lr": 5e-4,
            },
        },
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def test_what_the_user_chose_stays() -> None:
    chosen = {
        "steps_per_print": 7,
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0, "momentum": 0.5}},
        "scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": 0.2}},
        "gradient_clipping": 3,
        "data_types": {"keep_in_fp32_modules": "auto"},
    }
    found = resolved(chosen)
    assert {key: found[key] for key in chosen} == chosen
    assert effective_learning_rate(found) == 0.2


def test_resolve_leaves_its_input_as_it_is_and_its_output_fixed() -> None:
    raw = copy.deepcopy(TRAINER)
    once = resolved(raw, 3, learning_rate=1e-3)
    assert raw == TRAINER
    assert resolved(once, 3) == once


def test_a_value_of_the_file_wins_over_a_default_and_fills_what_follows_from_it() -> None:
    found = resolved(changed(TRAINER, optimizer__params__lr=0.003, gradient_clipping=5.0, bf16__enabled=True))
    assert get(found, "scheduler.params.warmup_max_lr") == effective_learning_rate(found) == 0.003
    assert found["gradient_clipping"] == 5.0
    assert (precision(found), get(found, "fp16.enabled")) == ("bf16", False)


def test_offloaded_optimizer_states_get_deepspeeds_own_adam() -> None:
    found = resolved(changed(BARE, zero_optimization__offload_optimizer={"device": "cpu"}))
    assert found["optimizer"]["type"] == "AdamW"
    assert "torch_adam" not in found["optimizer"]["params"]


@pytest.mark.parametrize(
    ("kind", "filled"),
    [
        ("WarmupLR", {"warmup_num_steps": 30, "warmup_min_lr": 0.0, "warmup_max_lr": 5e-4}),
        ("WarmupCosineLR", {"warmup_num_steps": 30, "total_num_steps": 300}),
        ("OneCycle", {}),
    ],
)
def test_each_scheduler_gets_the_values_that_it_takes(kind: str, filled: dict[str, float]) -> None:
    found = resolved(changed(BARE, scheduler__type=kind))["scheduler"].get("params", {})
    assert found == filled


@pytest.mark.parametrize(("asked", "bf16", "fp16"), [("fp32", 0, 0), ("bf16", 1, 0), ("fp16", 0, 1)])
@pytest.mark.parametrize("raw", [TRAINER, BARE], ids=["auto", "absent"])
def test_precision_turns_the_right_section_on(raw: dict[str, Any], asked: str, bf16: bool, fp16: bool) -> None:
    found = resolved(raw, precision=asked)
    assert (get(found, "bf16.enabled"), get(found, "fp16.enabled")) == (bf16, fp16)
    assert precision(found) == (None if asked == "fp32" else asked)


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),
    [
        ({}, 1, (16, 16, 1)),
        ({}, 2, (16, 8, 1)),
        ({}, 3, (18, 6, 1)),
        ({}, 7, (21, 3, 1)),
        ({}, 32, (32, 1, 1)),
        ({"train_batch_size": 12}, 3, (12, 4, 1)),
        ({"micro_batch_size": 2}, 3, (6, 2, 1)),
        ({"gradient_accumulation_steps": 5}, 2, (20, 2, 5)),
        ({"train_batch_size": 12, "micro_batch_size": 2}, 3, (12, 2, 2)),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 2}, 3, (12, 2, 2)),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 5}, 3, (30, 2, 5)),
        ({"train_batch_size": 30, "micro_batch_size": 2, "gradient_accumulation_steps": 5}, 3, (30, 2, 5)),
    ],
)
@pytest.mark.parametrize("by_flag", [True, False], ids=["flags", "file"])
def test_batch_sizes_are_solved_for_what_is_missing(
    given: dict[str, int], world_size: int, expected: tuple[int, ...], by_flag: bool
) -> None:
    keys = dict(zip(("train_batch_size", "micro_batch_size", "gradient_accumulation_steps"), BATCH, strict=True))
    raw = BARE if by_flag else BARE | {keys[flag]: value for flag, value in given.items()}
    assert batch_of(resolved(raw, world_size, **(given if by_flag else {}))) == expected


@pytest.mark.parametrize(
    ("raw", "given", "piece"),
    [
        ({"train_batch_size": 16}, {}, "train_batch_size 16 is not micro_batch_size 5"),
        ({"train_batch_size": 2}, {}, "micro_batch_size 0 x gradient_accumulation_steps 1 x 3 ranks = 0"),
        ({"train_batch_size": 12}, {"micro_batch_size": 5}, "5 x gradient_accumulation_steps 0 x 3 ranks = 0"),
        ({}, {"train_batch_size": 12, "gradient_accumulation_steps": 3}, "1 x gradient_accumulation_steps 3 x 3 ranks"),
        (
            {},
            {"train_batch_size": 12, "micro_batch_size": 2, "gradient_accumulation_steps": 3},
            "train_batch_size 12 is not micro_batch_size 2 x gradient_accumulation_steps 3 x 3 ranks = 18, leave one",
        ),
        ({"train_batch_size": 0}, {}, '"train_batch_size": 0, it must be a whole number in [1, 1000000]'),
        ({"gradient_accumulation_steps": 1.5}, {}, '"gradient_accumulation_steps": 1.5, it must be a whole number'),
        ({"train_micro_batch_size_per_gpu": "4"}, {}, '"train_micro_batch_size_per_gpu": "4", it must be a number'),
    ],
)
def test_batch_sizes_that_do_not_multiply_show_the_arithmetic(
    raw: dict[str, Any], given: dict[str, int], piece: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(piece)):
        resolved(BARE | raw, 3, **given)


@pytest.mark.parametrize(
    ("flags", "change", "pieces"),
    [
        (
            {"learning_rate": 1e-3},
            {"optimizer__params__lr": 0.5},
            ["--learning_rate 0.001", '"optimizer.params.lr": 0.5'],
        ),
        ({"learning_rate": 1e-3}, {"scheduler__params__warmup_max_lr": 0.5}, ['"scheduler.params.warmup_max_lr": 0.5']),
        ({"weight_decay": 0.2}, {"optimizer__params__weight_decay": 0}, ["--weight_decay 0.2", 'weight_decay": 0,']),
        ({"max_grad_norm": 2.0}, {"gradient_clipping": 1.0}, ["--max_grad_norm 2.0", '"gradient_clipping": 1.0']),
        ({"train_batch_size": 8}, {"train_batch_size": 16}, ["--train_batch_size 8", '"train_batch_size": 16']),
        ({"micro_batch_size": 8}, {"train_micro_batch_size_per_gpu": 4}, ["--micro_batch_size 8", 'per_gpu": 4']),
        ({"gradient_accumulation_steps": 8}, {"gradient_accumulation_steps": 4}, ["--gradient_accumulation_steps 8"]),
        ({"precision": "fp32"}, {"bf16__enabled": True}, ["--precision fp32 asks for false", '"bf16.enabled": true']),
        ({"precision": "fp16"}, {"fp16__enabled": False}, ["--precision fp16 asks for true", '"fp16.enabled": false']),
        ({"precision": "bf16"}, {"fp16__enabled": True}, ["--precision bf16", '"fp16.enabled": true']),
        (
            {"max_steps": 90, "recovery_steps": 10},
            {"scheduler__params__total_num_steps": 90},
            ["--max_steps 90 --recovery_steps 10 asks for 100", '"scheduler.params.total_num_steps": 90'],
        ),
        (
            {"lr_warmup_fraction": 0.5},
            {"scheduler__params__warmup_num_steps": 7},
            ["--lr_warmup_fraction 0.5 asks for 150", '"scheduler.params.warmup_num_steps": 7'],
        ),
    ],
)
def test_a_flag_that_contradicts_the_file_quotes_both(
    flags: dict[str, Any], change: dict[str, Any], pieces: list[str]
) -> None:
    raw = changed(TRAINER, **change)
    with pytest.raises(ValueError, match="drop one of them") as error:
        resolved(raw, **flags)
    assert all(piece in str(error.value) for piece in pieces)
    resolve(raw, Config.from_flat(flags), frozenset(), 1, 13)  # the same values as defaults give way to the file


def test_a_flag_that_agrees_with_the_file_is_no_contradiction() -> None:
    raw = changed(TRAINER, optimizer__params__lr=1e-3, gradient_clipping=2, bf16__enabled=True, train_batch_size=4)
    found = resolved(raw, learning_rate=1e-3, max_grad_norm=2.0, precision="bf16", train_batch_size=4)
    assert (effective_learning_rate(found), found["train_batch_size"]) == (1e-3, 4)


@pytest.mark.parametrize(
    ("change", "piece"),
    [
        ({"zero_optimization": None}, 'the ds_config has no "zero_optimization", add {"stage": 3}'),
        ({"zero_optimization": {}}, '"zero_optimization.stage": 0, it must be 3: masks and scores are sharded'),
        ({"zero_optimization__stage": 2}, '"zero_optimization.stage": 2, it must be 3'),
        ({"zero_optimization": True}, '"zero_optimization": true, it must be an object'),
        ({"bf16": True}, '"bf16": true, it must be an object'),
        ({"optimizer__params": []}, '"optimizer.params": [], it must be an object'),
        ({"bf16__enabled": 1}, '"bf16.enabled": 1, it must be true or false, or "auto"'),
        ({"optimizer__params__lr": "1e-4"}, '"optimizer.params.lr": "1e-4", it must be a number, or "auto"'),
        ({"gradient_clipping": True}, '"gradient_clipping": true, it must be a number'),
        ({"bf16__enabled": True, "fp16__enabled": True}, 'both "bf16.enabled" and "fp16.enabled"'),
        ({"zero_optimization__sub_group_size": "auto"}, '"zero_optimization.sub_group_size": "auto", which no flag'),
        ({"optimizer__params__momentum": "auto"}, '"optimizer.params.momentum": "auto", which no flag fills'),
        ({"compression_training": {"row_pruning": {}}}, "--criterion and --remaining say what is pruned here"),
        ({"zero_optimization__offload_optimizer": {"device": "nvme"}}, 'never tried from NVMe; use "cpu"'),
        ({"zero_optimization__offload_param": {"device": "nvme"}}, 'in memory; use "cpu"'),
        ({"zero_optimization__zero_hpz_partition_size": 8}, 'zero_hpz_partition_size": 8, which scale_prune cannot'),
        ({"zero_optimization__zero_quantized_weights": True}, "not quantized; remove the key"),
        ({"hybrid_engine": {"enabled": True}}, '"hybrid_engine.enabled": true'),
        ({"elasticity": {"enabled": True}}, "DeepSpeed no longer has it; remove the section"),
        ({"tensor_parallel": {"autotp_size": 2}}, '"tensor_parallel.autotp_size": 2'),
    ],
)
def test_what_pruning_cannot_work_with_is_refused(change: dict[str, Any], piece: str) -> None:
    with pytest.raises(ValueError, match=re.escape(piece)):
        resolved(changed(TRAINER, **change))


@pytest.mark.parametrize(
    ("section", "named", "says"),
    [
        ("scheduler", {"type": "StepLR", "params": {"step_size": 7}}, "is none of DeepSpeed's, choose LRRangeTest, "),
        ("scheduler", {"type": "CosineAnnealingLR", "params": {"T_max": 7}}, "OneCycle, WarmupLR, WarmupDecayLR, "),
        ("optimizer", {"type": "Muon", "params": {"lr": 0.1}}, "not of one kind, choose adagrad, adam, adamw, "),
        ("optimizer", {"type": "SGD", "params": {"lr": 0.1}}, 'where "zero_allow_untested_optimizer" is true'),
    ],
)
def test_what_no_engine_starts_with_or_no_checkpoint_holds_is_refused(
    section: str, named: dict[str, Any], says: str
) -> None:
    raw = changed(BARE, zero_optimization__reduce_scatter=False) | {section: named}
    with pytest.raises(ValueError, match=f'"{section}.type": "{named["type"]}", which .*{says}|whose .*{says}'):
        ds_check.check(resolved(raw))


@pytest.mark.parametrize("path", REFUSED)
def test_every_refused_key_is_refused_and_its_harmless_values_are_not(path: str) -> None:
    harmless, reason = REFUSED[path]
    key = path.replace(".", "__")
    with pytest.raises(ValueError, match=re.escape(f'"{path}"')) as error:
        resolved(changed(TRAINER, **{key: 5}))
    assert reason in str(error.value)
    for value in harmless:
        assert get(resolved(changed(TRAINER, **{key: value})), path) == value


OWN = {"optimizer__params__lr": 2e-4, "optimizer__params__weight_decay": 0.1, "gradient_clipping": 0.5}


@pytest.mark.parametrize(
    "raw",
    [
        *(load(name) for name in NAMES),
        changed(TRAINER, **OWN, scheduler__params__warmup_num_steps=7, bf16__enabled=True),
        changed(TRAINER, **OWN, fp16__enabled=True, scheduler__params__warmup_max_lr=2e-4),
    ],
)
def test_what_a_ds_config_has_decided_does_not_contradict_it_when_it_is_said(raw: dict[str, Any]) -> None:
    found = resolved(raw)
    config = replace(Config(), training=as_it_runs(found, Config().training, Config().training.max_steps))
    assert resolve(raw, config, frozenset(config.flat()), 1, 13) == found


def test_buckets_that_need_an_unknown_width_are_named() -> None:
    with pytest.raises(ValueError, match=r'"zero_optimization\.reduce_bucket_size": "auto" needs the width'):
        resolved(TRAINER, hidden_size=None)


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        (b'{"a": 1,\n "b" 2}', "is not valid JSON at line 2, column 6"),
        (b"", "is not valid JSON at line 1, column 1"),
        (b"[3]", "holds [3], it must be an object"),
        (b'{"bf16": {"enabled": true, "enabled": false}}', 'the key "enabled" is there twice'),
        (b'{"a": "\xff"}', "is not valid: 'utf-8' codec"),
    ],
)
def test_a_file_that_is_no_ds_config_is_refused(tmp_path: Path, content: bytes, piece: str) -> None:
    file = tmp_path / "ds.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(piece)) as error:
        load(str(file))
    assert str(error.value).startswith(f"--ds_config {file} ")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist, give a JSON file or one of zero3, zero3_cpu"):
        load(str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load(str(tmp_path))


def test_a_file_is_found_by_its_path_and_by_its_name() -> None:
    assert load("zero3") == load(str(BUILTIN / "zero3.json"))
    assert load(None) == load("zero3_cpu")


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_every_ds_config_is_complete_for_every_number_of_ranks(name: str, world_size: int) -> None:
    found = resolve(load(name), Config(), frozenset(), world_size, 13)
    total, micro, accumulation = batch_of(found)
    assert '"auto"' not in json.dumps(found)
    assert total == micro * accumulation * world_size >= 16
    assert precision(found) == {"zero3": "bf16", "zero3_offload": "bf16", "zero3_fp16": "fp16"}.get(name)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_has_real_settings_only(recipe: Path, world_size: int) -> None:
    config, explicit = parse(["--config", str(recipe)], criteria=CRITERIA)
    found = resolve(load(config.training.ds_config), config, explicit, world_size, 13)
    assert '"auto"' not in json.dumps(found)
    assert found["train_batch_size"] == config.training.train_batch_size
    assert effective_learning_rate(found) == config.training.learning_rate


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_reads_what_resolve_returns(name: str) -> None:
    read = DeepSpeedConfig(resolve(load(name), Config(), frozenset(), 1, 13))
    assert (read.train_batch_size, read.gradient_accumulation_steps, read.zero_optimization_stage) == (16, 1, 3)
    assert read.optimizer_params["lr"] == 5e-4
    assert read.scheduler_params["total_num_steps"] == 300
    assert read.zero_config.param_persistence_threshold == 130
    assert read.bfloat16_config.enabled == (precision(read._param_dict) == "bf16")


def test_there_is_something_to_test() -> None:
    assert set(NAMES) >= {"zero3", "zero3_cpu", "zero3_fp16", "zero3_offload"}
    assert len(RECIPES) >= 3


@pytest.mark.parametrize(
    ("capability", "device", "asked", "said"),
    [
        ("AVX2", "cpu", "bf16", "no instructions for bf16"),
        ("AVX2", "cpu", "fp16", "no instructions for fp16"),
        ("AVX2", "cpu", "fp32", ""),
        ("AVX2", "cuda", "bf16", ""),
        ("AVX2", "cuda", "fp32", "--ds_config zero3 is in bf16"),
        ("AVX512", "cpu", "bf16", ""),
    ],
)
def test_a_precision_that_is_slow_on_the_device_is_said(
    capability: str, device: str, asked: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    ds_config = {name: {"enabled": name == asked} for name in ("bf16", "fp16")}
    line = slow_precision(torch.device(device), ds_config)
    assert said in line if said else not line
