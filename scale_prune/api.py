"""Pruning in a DeepSpeed loop of your own: `attach`, two calls in the loop, then `compact` and `save`."""

from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from scale_prune.config import PruningConfig
from scale_prune.export import write_model
from scale_prune.families import unit_groups
from scale_prune.pruner import Pruner
from scale_prune.report import model_card
from scale_prune.zero3 import Zero3Backend, compact_engine


def attach(engine: Any, config: PruningConfig, *, total_steps: int, seed: int = 0) -> Pruner:
    """Make a pruner for an engine.

    In the loop, call `pruner.after_backward()` after every `engine.backward(loss)` and `pruner.after_step()`
    after every `engine.step()`; nothing else changes. All ranks call them.

    Args:
        engine: a DeepSpeed engine with ZeRO stage 3 around a Hugging Face causal language model.
        config: what is pruned, how far and how fast.
        total_steps: optimizer steps that the loop will make, at least 1.
        seed: seed of random scores and of the sampled tokens, at least 0.

    Raises:
        ValueError: the stage is not 3, the architecture is unknown, the MLPs are frozen, or the settings cannot be met.
    """
    backend = Zero3Backend(engine)
    groups = unit_groups(engine.module)
    backend.check(groups)
    return Pruner(backend, groups, config, total_steps=total_steps, seed=seed)


def compact(pruner: Pruner, make_engine: Callable[[nn.Module], Any]) -> Any:
    """Remove the masked neurons for good and return a new, smaller engine; the old one is destroyed. A collective.

    Args:
        pruner: from `attach`; it is used up.
        make_engine: builds an engine around a module, as the loop built its own, with the same optimizer.
    """
    assert isinstance(pruner.backend, Zero3Backend)
    engine, _ = compact_engine(pruner.backend, pruner.groups, pruner.masks_by_name, make_engine)
    return engine


def save(
    engine: Any,
    folder: str | PathLike[str],
    *,
    layout: str = "per_layer",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a compacted engine's model as a Hugging Face folder. A collective; rank 0 writes.

    Args:
        engine: from `compact`.
        folder: a new or empty folder.
        layout: "per_layer", "pad" or "uniform".
        tokenizer: written along, if there is one.

    Raises:
        ValueError: the layout cannot hold the widths, or the folder holds something.
    """
    backend = Zero3Backend(engine)
    groups = unit_groups(engine.module)
    config = engine.module.config
    write_model(
        folder,
        config=config,
        tensors=backend.named_tensors(),
        groups=groups,
        layout=layout,
        tokenizer=tokenizer,
        card=model_card({"model": config.name_or_path}, widths=[group.num_units for group in groups], layout=layout),
        is_writer=backend.rank == 0,
    )
