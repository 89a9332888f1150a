"""Structured pruning of causal language models while they are fine-tuned under DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
