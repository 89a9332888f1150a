"""What DeepSpeed and torch would say of a ds_config, asked before the model is loaded and ranks wait for each other."""

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, MUON_OPTIMIZER, DeepSpeedConfig
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from pydantic import ValidationError

from scale_prune.config import get
from scale_prune.zero3.quiet import quieten

# What DeepSpeed takes out of the parameters of Adam before it makes one.
OF_ADAM = {"torch_adam", "adam_w_mode", "fp32_optimizer_states", "foreach"}


def check(ds_config: dict[str, Any], *, trains: bool = True) -> None:
    """Refuse a complete ds_config that DeepSpeed, the optimizer or the scheduler would not take.

    Args:
        ds_config: without "auto" values.
        trains: False where no engine takes the optimizer.

    Raises:
        ValueError: one of them would not; the message says which, and why.
    """
    quieten()
    _check_optimizer(ds_config, trains=trains)
    _check_scheduler(ds_config)
    # Without the total, which is for all ranks: before they have met, DeepSpeed knows of one.
    own = {key: value for key, value in ds_config.items() if key != "train_batch_size"}
    try:
        with refusal("DeepSpeed cannot read the ds_config"):
            DeepSpeedConfig(own)
    except ValueError as error:
        if isinstance(error.__cause__, ValidationError):
            raise ValueError(_first_of(error.__cause__, ds_config)) from error
        raise


@contextmanager
def refusal(what: str) -> Iterator[None]:
    """Turn what DeepSpeed raises at a wrong ds_config into a ValueError; what it raises where ranks fail passes."""
    try:
        yield
    except RuntimeError:
        raise
    except Exception as error:  # assertions, types, keys, attributes, pydantic's, its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{what}: {reason}") from error


def _first_of(error: ValidationError, ds_config: dict[str, Any]) -> str:
    """Say where the first of a section's mistakes is, and what it is."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    known = (f"{section}.{key}" for section in ds_config if get(ds_config, f"{section}.{key}") is not None)
    found = json.dumps(first["input"], default=str)[:60]
    return f'the ds_config has "{next(known, key)}": {found}, which DeepSpeed does not take: {first["msg"]}'


def _check_optimizer(ds_config: dict[str, Any], *, trains: bool) -> None:
    name, params = ds_config["optimizer"]["type"], ds_config["optimizer"]["params"]
    made_by = _optimizer_of(name, params, on_cpu=get(ds_config, "zero_optimization.offload_optimizer.device") == "cpu")
    own = [each for each in DEEPSPEED_OPTIMIZERS if each != MUON_OPTIMIZER]
    if made_by is None and str(name).lower() in own:
        return  # the engine knows more of it
    if made_by is None:
        known = ", ".join([*own, "or a class of torch.optim, as SGD"])
        why = "whose moments are not of one kind" if str(name).lower() == MUON_OPTIMIZER else "which is unknown"
        raise ValueError(f'the ds_config has "optimizer.type": {json.dumps(name)}, {why}, choose {known}')
    # The parameters themselves come first.
    valid = dict(list(inspect.signature(made_by).parameters.items())[1:])
    extra = OF_ADAM if name.lower() in ("adam", "adamw") else set()
    for key, value in params.items():
        if key not in valid and key not in extra:
            raise ValueError(
                f'the ds_config has "optimizer.params.{key}", which {made_by.__name__} does not know; '
                f"it takes {', '.join(valid)}"
            )
        if key in valid and not _fits(key, value, valid[key].default):
            needed = "two numbers from 0 to below 1" if key == "betas" else "a number, at least 0"
            raise ValueError(
                f'the ds_config has "optimizer.params.{key}": {json.dumps(value)[:60]}, it must be {needed}'
            )
    if trains and made_by not in ZERO_SUPPORTED_OPTIMIZERS and not ds_config.get("zero_allow_untested_optimizer"):
        raise ValueError(
            f'the ds_config has "optimizer.type": {json.dumps(name)}, which DeepSpeed takes under ZeRO only where '
            '"zero_allow_untested_optimizer" is true'
        )


def _optimizer_of(name: Any, params: Mapping[str, Any], *, on_cpu: bool) -> Callable[..., Any] | None:
    """Return the class that DeepSpeed makes for a type; None where there is none."""
    if not isinstance(name, str):
        return None
    adam = torch.optim.AdamW if params.get("torch_adam") else DeepSpeedCPUAdam if on_cpu else FusedAdam
    classes: dict[str, Any] = {
        "adam": adam,
        "adamw": adam,
        "adagrad": DeepSpeedCPUAdagrad if on_cpu else torch.optim.Adagrad,
        "lamb": FusedLamb,
        "lion": DeepSpeedCPULion if on_cpu else FusedLion,
    }
    own = name.lower() in DEEPSPEED_OPTIMIZERS
    found = classes.get(name.lower()) if own else getattr(torch.optim, name, None)
    known = inspect.isclass(found) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
    return found if known else None


def _fits(key: str, value: Any, default: Any) -> bool:
    """Tell whether a value is of its default's kind: a number of at least 0, or, as betas, two below 1."""
    if key == "betas":
        return isinstance(value, list) and len(value) == 2 and all(_is_number(each) and each < 1 for each in value)
    is_numeric = isinstance(default, int | float) and not isinstance(default, bool)
    return _is_number(value) if is_numeric else True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _check_scheduler(ds_config: dict[str, Any]) -> None:
    name, params = ds_config["scheduler"]["type"], ds_config["scheduler"].get("params") or {}
    if name not in lr_schedules.VALID_LR_SCHEDULES:  # torch's refuse the optimizer of ZeRO-3, which is none of torch's
        known = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        raise ValueError(
            f'the ds_config has "scheduler.type": {json.dumps(name)}, which is none of DeepSpeed\'s, choose {known}'
        )
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=float(ds_config["optimizer"]["params"]["lr"]))
    with refusal(f"the scheduler {name} does not take the ds_config's scheduler.params {json.dumps(params)[:200]}"):
        scheduler = getattr(lr_schedules, name)(optimizer, **params)
        optimizer.step()
        scheduler.step()
