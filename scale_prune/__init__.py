"""Structured pruning of causal language models while they are fine-tuned under DeepSpeed ZeRO-3."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "api": ("attach", "compact", "prepare", "save"),
    "checkpoint": ("load_state", "save_state"),
    "config": ("PruningConfig",),
    "integrations": ("PruningCallback", "follow"),
    "criteria": ("Criterion", "GatedCriterion", "Moment", "ShardView", "State", "register_criterion"),
    "models": ("Family", "register_family"),
}
__all__ = [name for names in _ROOMS.values() for name in names]


def __getattr__(name: str) -> Any:
    """Import a name when it is used: the interface for loops of one's own starts DeepSpeed, which takes seconds."""
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"scale_prune.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
