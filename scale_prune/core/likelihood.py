"""Perplexity: exp(total negative log-likelihood / predicted tokens), with sums over all batches and ranks.

In each block every token but the first is predicted, from the tokens before it.

Shape letters: B rows, T tokens in a row, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LOGITS_AT_A_TIME = 2**24


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the negative log-likelihood of the tokens that `logits` predict.

    Logits of any precision are turned into fp32 a few rows at a time (64 MiB), never as a whole.

    Args:
        logits: (B, T, V), any floating type; position t predicts the token at t + 1.
        labels: int64 (B, T), the tokens themselves, not shifted; -100 is not counted.

    Returns:
        the sum, float64, in nats, and the number of counted tokens, int64; both without dimensions.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    positions = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
    for row, targets in zip(logits, labels[:, 1:], strict=True):
        for part, wanted in zip(row[:-1].split(positions), targets.split(positions), strict=True):
            total += cross_entropy(part.float(), wanted, reduction="none").double().sum()
    return total, (labels[:, 1:] >= 0).sum()


@torch.no_grad()
def perplexity(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    add_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> float:
    """Measure how well a model predicts a text.

    Communicates 16 bytes a rank, once, through `add_over_ranks`, beside what `forward` does.

    Args:
        forward: turns input_ids, int64 (B, T), into logits (B, T, V); it moves them to its own device, and is in
            evaluation mode (no dropout).
        batches: this rank's input_ids and labels, both (B, T); labels are not shifted, and -100 where nothing counts.
        add_over_ranks: adds a float64 tensor of 2 numbers, on the device of the logits, over all ranks; in one process
            it is left out.

    Returns:
        the perplexity, at least 1; infinity where it is beyond a float's range, nan where a logit is nan.

    Raises:
        ValueError: no token is predicted.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for input_ids, labels in batches:
        logits = forward(input_ids)
        sums = sums.to(logits.device) + torch.stack(negative_log_likelihood(logits, labels.to(logits.device)))
    total, count = add_over_ranks(sums).tolist()
    if count == 0:
        raise ValueError("perplexity needs at least one block of 2 tokens, found none")
    return _exp(total / count)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


IGNORED = -100  # the label that torch's cross_entropy passes over
