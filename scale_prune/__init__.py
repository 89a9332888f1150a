"""Structured pruning of causal language models while they are fine-tuned under DeepSpeed ZeRO-3."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["attach", "compact", "load_state", "prepare", "save", "save_state"]


def __getattr__(name: str) -> Any:
    """Import the interface for loops of one's own only when it is used: it starts DeepSpeed, which takes seconds."""
    if name in __all__:
        from scale_prune import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
