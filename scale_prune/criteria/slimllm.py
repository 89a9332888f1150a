"""SlimLLM: heads by how well their layer does without them, neurons by the principal directions of what they add to.

Source: arXiv 2505.22689. Heads: the correlation, output by output, of what the kept heads add up to with what all do.
Neurons: the norm of the output weights along the eigenvectors of the output's covariance, weighed by a sigmoid of the
eigenvalues, times the norm of the activation. All of it follows from Gram matrices.
Deviations: heads are taken out one by one, each time the one that is missed least, so that any number can stay, where
the paper begins with a ranking and swaps; of neurons the norms of the input weights are left out, which take the norms
of the MLP's input, and so is the exemption of the lowest 1 %; where there is no column of ones nothing is centered.
"""

import torch
from torch import Tensor

from scale_prune.core import UnsolvableError
from scale_prune.criteria.base import Criterion


class Slimllm(Criterion):
    """Keep the heads that are missed most, and the neurons that write along the principal directions of the output."""

    needs = frozenset({"gram"})

    def rank_units(self, gram: Tensor, weight: Tensor, block: int) -> Tensor:
        """Return the units' scores, (N,).

        Raises:
            UnsolvableError: the matrix is not finite.
        """
        if not gram.isfinite().all():
            raise UnsolvableError("the Gram matrix is not finite")
        covariance = _centered(gram.double(), weight.shape[1])
        of = _of_neurons if block == 1 else _of_heads
        return of(gram.diagonal()[: weight.shape[1]], covariance, weight.double(), block).float()


def _centered(gram: Tensor, features: int) -> Tensor:
    """Return (N, N) sums of products, of deviations from the mean where there is a column of ones."""
    products = gram[:features, :features]
    if len(gram) == features:
        return products
    sums = gram[features, :features]
    return products - sums.outer(sums) / gram[features, features]


def _of_neurons(squares: Tensor, covariance: Tensor, weight: Tensor, block: int) -> Tensor:
    values, directions = torch.linalg.eigh(weight @ covariance @ weight.T)
    weighed = directions.T @ weight * (values / values.mean().clamp(min=1e-30)).sigmoid()[:, None]
    return weighed.norm(dim=0) * squares.double().sqrt()


def _of_heads(squares: Tensor, covariance: Tensor, weight: Tensor, block: int) -> Tensor:
    """Return for each head how far the outputs' mean correlation is from 1 once it is gone, in the order they go."""
    shared = shared_variance(covariance, weight, block)
    total, with_all = shared.sum((1, 2)), shared.sum(2)
    staying = list(range(shared.shape[1]))
    scores = torch.zeros(len(staying), dtype=shared.dtype, device=shared.device)
    worst = scores.new_zeros(())
    while len(staying) > 1:
        errors = []
        for head in staying:
            others = [other for other in staying if other != head]
            own = shared[:, others][:, :, others].sum((1, 2))
            correlation = with_all[:, others].sum(1) / (own * total).clamp(min=1e-60).sqrt()
            errors.append(1 - correlation.abs().mean())
        least = int(torch.stack(errors).argmin())
        worst = torch.maximum(worst, errors[least])
        scores[staying.pop(least)] = worst
    scores[staying[0]] = torch.maximum(worst, scores.new_ones(()))
    return scores


def shared_variance(covariance: Tensor, weight: Tensor, block: int) -> Tensor:
    """Return (D, H, H): of every output, what two heads' parts of it have in common, summed over tokens.

    Args:
        covariance: (N, N) of what the projection reads.
        weight: (D, N).
        block: features of a head, N / H.
    """
    heads = range(weight.shape[1] // block)
    rows = []
    for head in heads:
        own = slice(head * block, (head + 1) * block)
        products = (weight[:, own] @ covariance[own]) * weight
        rows.append(products.view(len(weight), -1, block).sum(-1))
    return torch.stack(rows, 1)
