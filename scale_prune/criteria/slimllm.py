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
    grows = None

    def rank_units(self, gram: Tensor, weight: Tensor, block: int) -> Tensor:
        """Return the units' scores, (N,).

        Raises:
            UnsolvableError: the matrix is not finite.
        """
        if not gram.isfinite().all():
            raise UnsolvableError("the Gram matrix is not finite")
        covariance = _centered(gram, weight.shape[1])
        of = _of_neurons if block == 1 else _of_heads
        return of(gram.diagonal()[: weight.shape[1]], covariance, weight.double(), block).float()


def _centered(gram: Tensor, features: int) -> Tensor:
    """Return (N, N) float64 sums of products, of deviations from the mean where there is a column of ones."""
    products = gram[:features, :features].to(torch.float64, copy=True)  # the one matrix of this size
    if len(gram) > features:
        sums = gram[features, :features].double()
        products.addr_(sums, sums, alpha=-1 / float(gram[features, features]))
    return products


def _of_neurons(squares: Tensor, covariance: Tensor, weight: Tensor, block: int) -> Tensor:
    values, directions = torch.linalg.eigh(weight @ covariance @ weight.T)
    weighed = directions.T @ weight * (values / values.mean().clamp(min=1e-30)).sigmoid()[:, None]
    return weighed.norm(dim=0) * squares.double().sqrt()


def _of_heads(squares: Tensor, covariance: Tensor, weight: Tensor, block: int) -> Tensor:
    """Return for each head how far the outputs' mean correlation is from 1 once it is gone, in the order they go."""
    shared = shared_variance(covariance, weight, block)
    total, with_all, own = shared.sum((1, 2))[:, None], shared.sum(2), shared.diagonal(dim1=1, dim2=2)
    staying = torch.arange(shared.shape[1], device=shared.device)
    scores = shared.new_zeros(len(staying))
    worst = shared.new_zeros(())
    while len(staying) > 1:
        among, has = shared[:, staying][:, :, staying].sum(2), with_all[:, staying]
        variance = among.sum(1, keepdim=True) - 2 * among + own[:, staying]  # of what stays without each of them
        correlation = (has.sum(1, keepdim=True) - has) / (variance * total).clamp(min=1e-60).sqrt()
        error, least = (1 - correlation.abs().mean(0)).min(0)
        worst = torch.maximum(worst, error)
        scores[staying[least]] = worst
        staying = staying[torch.arange(len(staying), device=staying.device) != least]
    scores[staying] = worst.clamp(min=1)
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
