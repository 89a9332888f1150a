"""Adam's step on numbers that no optimizer of PyTorch holds: scores, gates, multipliers.

Source: arXiv 1412.6980, with its betas.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def adam_step(gradient: Tensor, mean: Tensor, square: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what to subtract at a learning rate of 1, and the new moments. Pure.

    Args:
        gradient: any shape.
        mean: running mean of gradients, 0 at the start.
        square: running mean of their squares, 0 at the start.
        count: number of gradients seen, this one included, at least 1.
    """
    mean = torch.lerp(gradient, mean, BETAS[0])
    square = torch.lerp(gradient.square(), square, BETAS[1])
    step = (mean / (1 - BETAS[0] ** count)) / ((square / (1 - BETAS[1] ** count)).sqrt() + EPSILON)
    return step, mean, square


def ascended(
    state: Mapping[str, Tensor], name: str, gradient: float | Tensor, rate: float, count: Tensor
) -> dict[str, Tensor]:
    """Return a multiplier and its moments, by name as in `state`, after a step up its gradient. Pure."""
    given = torch.ones_like(state[name]) * gradient
    step, mean, square = adam_step(given, state[f"{name}_mean"], state[f"{name}_square"], count)
    return {name: state[name] + rate * step, f"{name}_mean": mean, f"{name}_square": square}
