"""The DeepSpeed configuration: read it, refuse what would break pruning, fill what is "auto".

Plain dictionaries; DeepSpeed itself is not imported. "auto" is filled from the flags under the keys that users of
Hugging Face's Trainer know; an absent key that a flag stands for is filled in the same way. A flag that was given
contradicts another value in the file; a flag's default gives way to it.
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scale_prune.config.ds_limits import get, refuse_unsupported
from scale_prune.config.places import BUILTIN
from scale_prune.config.setting import BLOCKS
from scale_prune.config.settings import Config, TrainingConfig

AUTO = "auto"
DEFAULT = "zero3_cpu"
DEFAULT_BATCH = 16

FLAG_KEYS = (
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)
SCHEDULER_PARAMS = {
    "WarmupLR": ("warmup_num_steps", "warmup_min_lr", "warmup_max_lr"),
    "WarmupDecayLR": ("total_num_steps", "warmup_num_steps", "warmup_min_lr", "warmup_max_lr"),
    "WarmupCosineLR": ("total_num_steps", "warmup_num_steps"),
}
BATCH_FLAGS = {
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
DEEPSPEEDS_OWN_AUTO = {"data_types.keep_in_fp32_modules"}


@dataclass(frozen=True)
class Rule:
    """What the flags say about one key.

    Attributes:
        path: where the key stands, sections joined with dots.
        value: what fills "auto"; None where the flags do not know.
        flags: the flags that the value comes from.
    """

    path: str
    value: Any
    flags: tuple[str, ...] = ()


def load(path: str | None) -> dict[str, Any]:
    """Read a ds_config.

    Args:
        path: a JSON file, or the name of one in the folder ds_configs; None is "zero3_cpu".

    Raises:
        ValueError: the file is missing, cannot be read, is not JSON, is not an object, or has a key twice.
    """
    asked = path or DEFAULT
    named = BUILTIN / f"{asked}.json"
    file = named if named.is_file() and not Path(asked).exists() else Path(asked)
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite)
    except FileNotFoundError as error:
        names = ", ".join(sorted(file.stem for file in BUILTIN.glob("*.json")))
        raise ValueError(f"--ds_config {asked} does not exist, give a JSON file or one of {names}") from error
    except OSError as error:
        raise ValueError(f"--ds_config {asked} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"--ds_config {asked} is not valid JSON at {place}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--ds_config {asked} is not valid: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--ds_config {asked} holds {json.dumps(content)[:60]}, it must be an object in {{}}")
    return content


def resolve(
    raw: dict[str, Any], config: Config, explicit: frozenset[str], world_size: int, hidden_size: int | None
) -> dict[str, Any]:
    """Return a complete ds_config: nothing is "auto", every section that training needs is there.

    Args:
        raw: the ds_config as it was read; it is left as it is.
        config: the settings that fill it.
        explicit: names of the settings that were given, by flag or recipe, and may not be overridden.
        world_size: number of ranks, at least 1.
        hidden_size: width of the model, D; sizes the buckets that are "auto".

    Raises:
        ValueError: ZeRO's stage is not 3, a key is one that pruning cannot work with, a value contradicts a flag or is
            not a number, the batch sizes do not multiply, both precisions are on, or an "auto" cannot be filled.
    """
    ds_config = copy.deepcopy(raw)
    refuse_unsupported(ds_config)
    _add_missing(ds_config)
    for rule in _rules(ds_config, config.training, explicit, hidden_size):
        _apply(rule, ds_config, config.training, explicit)
    if get(ds_config, "bf16.enabled") and get(ds_config, "fp16.enabled"):
        raise ValueError('the ds_config has both "bf16.enabled" and "fp16.enabled", turn one of them off')
    ds_config |= _batch_sizes(ds_config, world_size)
    if left := [path for path in _auto_paths(ds_config) if path not in DEEPSPEEDS_OWN_AUTO]:
        raise ValueError(f'the ds_config has "{left[0]}": "auto", which no flag fills, write a value there')
    return ds_config


def precision(ds_config: dict[str, Any]) -> str | None:
    """Return "bf16" or "fp16" where the ds_config turns it on, else None."""
    return next((name for name in ("bf16", "fp16") if get(ds_config, f"{name}.enabled") is True), None)


def as_it_runs(ds_config: dict[str, Any], training: TrainingConfig, steps: int) -> TrainingConfig:
    """Return settings with what a complete ds_config has values of its own for, which may differ from the flags'.

    Args:
        ds_config: from `resolve`.
        training: the settings.
        steps: in which weights learn.
    """
    paths = {"learning_rate": "optimizer.params.lr", "weight_decay": "optimizer.params.weight_decay"}
    found = {name: get(ds_config, path) for name, path in (*paths.items(), ("max_grad_norm", "gradient_clipping"))}
    total, warmup = steps or 2, get(ds_config, "scheduler.params.warmup_num_steps")
    if warmup not in (None, _warmup(total, training)) and warmup < total:
        found["lr_warmup_fraction"] = warmup / total
    told = {name: value for name, value in found.items() if value is not None}
    return replace(training, precision=precision(ds_config) or "fp32", **told)


def _warmup(steps: int, training: TrainingConfig) -> int:
    return max(1, round(steps * training.lr_warmup_fraction))


def _finite(number: str) -> float:
    """Read a number; Python's JSON would take NaN, Infinity and 1e999 too."""
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is not a finite number")
    return float(number)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
        raise ValueError(f'the key "{twice[0]}" is there twice')
    return dict(pairs)


def _add_missing(ds_config: dict[str, Any]) -> None:
    """Write "auto" where an absent key stands for a flag, and keep DeepSpeed quiet."""
    if get(ds_config, "optimizer.type") is None:
        _default(ds_config, "optimizer.type", "AdamW")
        _default(ds_config, "optimizer.params.betas", AUTO)
        _default(ds_config, "optimizer.params.eps", AUTO)
        if get(ds_config, "zero_optimization.offload_optimizer.device") in (None, "none"):
            _default(ds_config, "optimizer.params.torch_adam", True)
    if get(ds_config, "scheduler.type") is None:
        _default(ds_config, "scheduler.type", "WarmupDecayLR")
        _default(ds_config, "scheduler.params.warmup_type", "linear")
    for key in SCHEDULER_PARAMS.get(ds_config["scheduler"]["type"], ()):
        _default(ds_config, f"scheduler.params.{key}", AUTO)
    for path in (*FLAG_KEYS, *BATCH_FLAGS):
        _default(ds_config, path, AUTO)
    _default(ds_config, "steps_per_print", 10**9)
    _default(ds_config, "wall_clock_breakdown", False)


def _rules(
    ds_config: dict[str, Any], training: TrainingConfig, explicit: frozenset[str], hidden_size: int | None
) -> list[Rule]:
    rate = _learning_rate(ds_config, training, explicit)
    dtype = training.precision if "precision" in explicit else precision(ds_config) or training.precision
    total = training.max_steps + training.recovery_steps or 2  # DeepSpeed warns of a schedule of 1 step
    square = hidden_size * hidden_size if hidden_size else None
    return [
        Rule("gradient_clipping", training.max_grad_norm, ("max_grad_norm",)),
        Rule("bf16.enabled", dtype == "bf16", ("precision",)),
        Rule("fp16.enabled", dtype == "fp16", ("precision",)),
        Rule("optimizer.params.lr", rate, ("learning_rate",)),
        Rule("optimizer.params.betas", [0.9, 0.999]),
        Rule("optimizer.params.eps", 1e-8),
        Rule("optimizer.params.weight_decay", training.weight_decay, ("weight_decay",)),
        Rule("scheduler.params.total_num_steps", total, ("max_steps", "recovery_steps")),
        Rule("scheduler.params.warmup_num_steps", _warmup(total, training), ("lr_warmup_fraction",)),
        Rule("scheduler.params.warmup_min_lr", 0.0),
        Rule("scheduler.params.warmup_max_lr", rate, ("learning_rate",)),
        Rule("zero_optimization.reduce_bucket_size", square),
        Rule("zero_optimization.stage3_prefetch_bucket_size", square and int(0.9 * square)),
        Rule("zero_optimization.stage3_param_persistence_threshold", hidden_size and 10 * hidden_size),
        *(Rule(path, getattr(training, flag), (flag,)) for path, flag in BATCH_FLAGS.items()),
    ]


def _learning_rate(ds_config: dict[str, Any], training: TrainingConfig, explicit: frozenset[str]) -> float:
    """Return the rate that fills "auto": of the flag if it was given, else the one that the ds_config has elsewhere."""
    found = [get(ds_config, path) for path in ("optimizer.params.lr", "scheduler.params.warmup_max_lr")]
    numbers = [rate for rate in found if type(rate) in (int, float)]
    return training.learning_rate if "learning_rate" in explicit or not numbers else numbers[0]


def _apply(rule: Rule, ds_config: dict[str, Any], training: TrainingConfig, explicit: frozenset[str]) -> None:
    """Fill the key where it is "auto"; elsewhere see that it is a number and does not contradict a flag."""
    found = get(ds_config, rule.path)
    on_off = isinstance(rule.value, bool)
    if found == AUTO:
        if rule.value is None and rule.path not in BATCH_FLAGS:
            raise ValueError(f'"{rule.path}": "auto" needs the width of the model, which is unknown, write a number')
        _put(ds_config, rule.path, rule.value)
    elif isinstance(found, str) or (found is not None and isinstance(found, bool) != on_off):
        valid = "true or false" if on_off else "a number"
        raise ValueError(f'the ds_config has "{rule.path}": {json.dumps(found)}, it must be {valid}, or "auto"')
    elif found not in (None, rule.value) and explicit.intersection(rule.flags):
        asked = " ".join(f"--{flag} {getattr(training, flag)}" for flag in rule.flags)
        raise ValueError(
            f'{asked} asks for {json.dumps(rule.value)}, but the ds_config has "{rule.path}": {json.dumps(found)}, '
            f'drop one of them or write "auto" in the file'
        )


def _batch_sizes(ds_config: dict[str, Any], world_size: int) -> dict[str, int]:
    """Solve train_batch_size = micro batch size x accumulation x ranks for what is not given."""
    given = [ds_config[key] for key in BATCH_FLAGS]
    for key, value in zip(BATCH_FLAGS, given, strict=True):
        if value is not None and (type(value) is not int or value not in BLOCKS):
            raise ValueError(f'the ds_config has "{key}": {json.dumps(value)}, it must be a whole number {BLOCKS}')
    total, micro, accumulation = given
    if micro is None or total is None:
        accumulation = accumulation or 1
    if total is None:
        micro = micro or -(-DEFAULT_BATCH // (accumulation * world_size))
        total = micro * accumulation * world_size
    micro = micro or total // (accumulation * world_size)
    accumulation = accumulation or total // (micro * world_size)
    if total != micro * accumulation * world_size:
        raise ValueError(_batch_message(total, micro, accumulation, world_size, all_given=None not in given))
    return dict(zip(BATCH_FLAGS, (total, micro, accumulation), strict=True))


def _batch_message(total: int, micro: int, accumulation: int, world_size: int, *, all_given: bool) -> str:
    product = f"micro_batch_size {micro} x gradient_accumulation_steps {accumulation} x {world_size} ranks"
    way_out = "leave one of the three out" if all_given else "give a train_batch_size that the others divide"
    return f"train_batch_size {total} is not {product} = {micro * accumulation * world_size}, {way_out}"


def _put(ds_config: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        if ds_config.get(section) is None:
            ds_config[section] = {}
        ds_config = ds_config[section]
    ds_config[key] = value


def _default(ds_config: dict[str, Any], path: str, value: Any) -> None:
    if get(ds_config, path) is None:
        _put(ds_config, path, value)


def _auto_paths(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _auto_paths(value, f"{prefix}{key}.")
        elif value == AUTO:
            yield prefix + key
