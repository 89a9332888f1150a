"""Retention: how much of a unit counts as kept, by the number that its gate is made of; smooth, and exact at both ends.

    s = clamp(sigmoid((z - mu) c / mu) (HIGH - LOW) + LOW, 0, 1),   s(0) = 0,  s(2 mu) = 1

While mu falls s comes closer to a step from 0 to 1 at z = 0, so that what is kept and what is not come apart.

Source: arXiv 2603.08065 (deterministic differentiable pruning), whose code has these limits and this way of mu.
"""

import math

import torch
from torch import Tensor

LOW, HIGH = -0.1, 1.1
STEEPNESS = math.log(-HIGH / LOW)  # 2.4, by which both ends are exact
FIRST_CENTER, LAST_CENTER = 0.5, 0.1


def center(progress: float) -> float:
    """Return mu at a part of the way, in [0, 1]."""
    return FIRST_CENTER - (FIRST_CENTER - LAST_CENTER) * math.sqrt(progress)


def retention(parameter: Tensor, mu: float) -> Tensor:
    """Return s of (N,) numbers z, in [0, 1]."""
    return (_sigmoid(parameter, mu) * (HIGH - LOW) + LOW).clamp(0, 1)


def retention_gradient(parameter: Tensor, mu: float) -> Tensor:
    """Return (N,) ds / dz; the clamp is passed straight through."""
    open_part = _sigmoid(parameter, mu)
    return (HIGH - LOW) * open_part * (1 - open_part) * STEEPNESS / mu


def _sigmoid(parameter: Tensor, mu: float) -> Tensor:
    return torch.sigmoid((parameter - mu) * STEEPNESS / mu)
