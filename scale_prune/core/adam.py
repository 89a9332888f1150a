"""Adam's step on numbers that no optimizer of PyTorch holds: scores, gates, multipliers.

Source: arXiv 1412.6980, with its betas.
"""

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
