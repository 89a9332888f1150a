"""Layers that make their activations once more in the backward pass, in the place of keeping them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_in_training(model: PreTrainedModel) -> None:
    """Let all layers recompute while the model trains.

    Raises:
        ValueError: the family cannot.
    """
    # transformers 5.23 renamed it, and warns of the older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Let the layers that recompute in training do so in evaluation too, where there is no dropout.

    What is run in the body is recomputed in its backward pass, wherever that is.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and not layer.training
    ]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
