"""What the tests on real ZeRO-3 engines share: tiny models, ds_configs, and reading a whole tensor back."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param
from memory_backend import steady_model, token_blocks
from models import VOCABULARY
from torch import Tensor

from scale_prune import attach, prepare
from scale_prune.config.settings import PruningConfig
from scale_prune.pruning.pruner import Pruner
from scale_prune.zero3 import load_model, training_engine

STEPS, BATCH, LAYERS = 7, 6, 2
BLOCKS = token_blocks(VOCABULARY)
SHARDED, ALL_GATHERED = 0, 10**6  # parameters with fewer elements stay gathered between steps


def saved_model(folder: Path, model_type: str, **settings: Any) -> Path:
    """Return the folder of a tiny model without dropout, made at the first call."""
    path, more = folder / model_type, {"gpt_neo": {"attention_types": [[["global", "local"], 1]]}}
    if not path.exists():
        steady_model(model_type, num_hidden_layers=LAYERS, **more.get(model_type, {}), **settings).save_pretrained(path)
    return path


def ds_config(
    *, accumulation: int = 1, persistence: int = SHARDED, learning_rate: float = 1e-2, **more: Any
) -> dict[str, Any]:
    """Return a ds_config without "auto"."""
    return {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": learning_rate, "weight_decay": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistence},
        "steps_per_print": 10**9,
        **more,
    }


def pruning(criterion: str, **settings: Any) -> PruningConfig:
    """Return settings under which one step is dense and two are made at the target."""
    usual = {"remaining": 0.4, "warmup_fraction": 0.2, "cooldown_fraction": 0.2, "similarity_every": 2}
    return PruningConfig(criterion=criterion, **usual | settings)


def start(path: Path, config: dict[str, Any], settings: PruningConfig) -> tuple[Any, Pruner]:
    """Return an engine and its pruner, on this rank."""
    model = load_model(str(path), config)
    prepare(model, settings)
    engine = training_engine(model, config)
    return engine, attach(engine, settings, total_steps=STEPS)


def call_each(worker: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call a worker several times in one process group, which is faster than several groups."""
    return [worker(*case) for case in cases]


def gathered(engine: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the whole of what the forward pass uses; of parameters that stay gathered, this very copy."""
    parameters = {name: engine.module.get_parameter(name) for name in names}
    hidden = [each for each in parameters.values() if each.ds_status != ZeroParamStatus.AVAILABLE]
    with deepspeed.zero.GatheredParameters(hidden):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def masters(engine: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the whole of the float32 masters."""
    full = {name: safe_get_full_fp32_param(engine.module.get_parameter(name)) for name in names}
    return {name: value.clone() for name, value in full.items()}


def logits(engine: Any, block: int = 1) -> Tensor:
    """Evaluate between two steps."""
    engine.eval()
    with torch.no_grad():
        found: Tensor = engine(input_ids=BLOCKS.block(block)[None].to(engine.device), use_cache=False).logits.float()
    engine.empty_partition_cache()
    engine.train()
    return found
