"""The hard-concrete gate: a random number that is often exactly 0 or 1, with a gradient for how often.

    s = sigmoid(log u - log(1 - u) + log_alpha),   u ~ U(0, 1)
    z = clamp((HIGH - LOW) * s + LOW, 0, 1)

A free gate may exceed 1: it is z (1 + SLOPE max(log_alpha - _SHIFT, 0)), whose second factor is without noise and
begins where a gate is 1 in the middle of its noise, as steep there as z.

Source: arXiv 1712.01312; limits and the temperature of 1 are those of the code of arXiv 1910.04732 (FLOP). That masks
want to exceed 1 is from the ablations of arXiv 2603.08065, which has another gate for it.
"""

import math

import torch
from torch import Tensor

LOW, HIGH = -0.1, 1.1
NOISE_MARGIN = 1e-6
"""Noise is drawn from [NOISE_MARGIN, 1 - NOISE_MARGIN], so that its logit is finite."""

_SHIFT = math.log(-HIGH / LOW)
_FIRST, _LAST = -LOW / (HIGH - LOW), (1 - LOW) / (HIGH - LOW)
"""The values of s between which z is neither 0 nor 1."""
SLOPE = (HIGH - LOW) * _LAST * (1 - _LAST)
"""dz / dlog_alpha where z comes to 1."""
_CLOSE_TO_ZERO = 1e-3


def sample(log_alpha: Tensor, noise: Tensor, *, free: bool = False) -> Tensor:
    """Return gates z in [0, 1], free ones from 0 on.

    Args:
        log_alpha: (N,) float32.
        noise: (N,) uniform in (0, 1).
        free: let gates exceed 1.
    """
    return (LOW + (HIGH - LOW) * _sigmoid(log_alpha, noise)).clamp(0, 1) * _reach(log_alpha, free)


def sample_gradient(log_alpha: Tensor, noise: Tensor, *, free: bool = False) -> Tensor:
    """Return (N,) dz / dlog_alpha at the same noise: 0 where the gate is clamped and does not exceed 1."""
    s = _sigmoid(log_alpha, noise)
    z = LOW + (HIGH - LOW) * s
    of_noise = torch.where((z > 0) & (z < 1), (HIGH - LOW) * s * (1 - s), 0.0)
    return of_noise * _reach(log_alpha, free) + z.clamp(0, 1) * SLOPE * (free & (log_alpha > _SHIFT))


def _reach(log_alpha: Tensor, free: bool) -> Tensor:
    """Return (N,) by how much a gate exceeds what the noise makes of it."""
    return 1 + SLOPE * (log_alpha - _SHIFT).relu() if free else torch.ones_like(log_alpha)


def _sigmoid(log_alpha: Tensor, noise: Tensor) -> Tensor:
    return (noise.clamp(NOISE_MARGIN, 1 - NOISE_MARGIN).logit() + log_alpha).sigmoid()


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return (N,) P(z != 0)."""
    return (log_alpha + _SHIFT).sigmoid()


def mean(log_alpha: Tensor, *, free: bool = False) -> Tensor:
    """Return (N,) E[z], exactly, in the dtype of `log_alpha`.

    The integral of P(z > t) over t in (0, 1). With a = exp(log_alpha) and c = (t - LOW) / (HIGH - LOW), P(z > t) is
    a (1 - c) / (a + (1 - a) c), whose antiderivative is elementary. The gate is symmetric, E[z](-x) = 1 - E[z](x), so
    that a <= 1 is all that needs to be computed.

    Deviation: the code of arXiv 1910.04732 uses sigmoid(0.8 * log_alpha), an approximation.
    """
    x = log_alpha.double()
    a = (-x.abs()).exp()
    k = (1 - a).clamp(min=1e-12)
    width = _LAST - _FIRST
    below = (HIGH - LOW) * a / k * (((a + k * _LAST) / (a + k * _FIRST)).log() / k - width)
    slope = (HIGH - LOW) * ((_LAST**2 - _FIRST**2) / 2 - (_LAST**3 - _FIRST**3) / 3)
    exact = torch.where(x > 0, 1 - below, below)
    of_noise = torch.where(x.abs() < _CLOSE_TO_ZERO, 0.5 + slope * x, exact)
    return (of_noise * _reach(x, free)).to(log_alpha.dtype)


def log_alpha_of(drop_rate: float) -> float:
    """Return the log_alpha of a gate whose s is below one half with a probability of `drop_rate`, in (0, 1)."""
    return math.log(1 - drop_rate) - math.log(drop_rate)
