"""What removed units did, taken over by those that stay; and which units can be spared at the least cost.

Everything follows from the Gram matrix G = h^T h of what the output projection W (D, N) reads. The survivors' weights
that leave the least squared error in its output are known in closed form, whoever chose them; so choice and repair are
separate. Where the projection has a bias, h has a last column of ones, which always stays: what it takes over is the
bias's.

A head is several features: those of all its units leave or stay together.

Shape legend: N features, F = N, or N + 1 with the ones, K of them stay, P go, D outputs; of neurons N is their number.

Source: optimal brain surgeon as in SlimGPT (arXiv 2412.18110) and ZipLM (arXiv 2302.04089); the mean as in FLAP (arXiv
2312.11983). Deviation: units leave in rounds of equal size, and their scores never fall from one round to the next.
"""

import torch
from torch import Tensor


class UnsolvableError(ValueError):
    """A Gram matrix that is not finite, or not positive definite in spite of the damping."""


OUTPUT_DAMPING = 1.0  # of the Gram matrices of gradients, as a fraction of the mean of their diagonals
WIDEST_IN_DOUBLE = 8192  # features; wider matrices are inverted in float32, which halves 2 GiB at N = 16,384


def gram_root(gram: Tensor, features: int, damping: float) -> Tensor:
    """Return the lower triangular (N, N) root of a Gram matrix, without its column of ones.

    Args:
        gram: (F, F) float32.
        features: N.
        damping: as of `least_squares`.

    Raises:
        UnsolvableError: as `least_squares`.
    """
    return _cholesky(_damped(gram, features, damping)[:features, :features])


def in_metric(weight: Tensor, output_gram: Tensor) -> Tensor:
    """Return (D, N) weights whose squared norms are errors of the loss, not of the output.

    Args:
        weight: (D, N) float32, what reads the units.
        output_gram: (D, D) float32, g^T g of the gradients of the output, token by token.

    Raises:
        UnsolvableError: as `least_squares`.
    """
    return gram_root(output_gram, len(output_gram), OUTPUT_DAMPING).T.float() @ weight


def taken_over(weight: Tensor, takeover: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Return a weight in which the units that stay do the others' part as well; the others' elements are as before.

    Args:
        weight: float32, what reads the units, N long along `dim`.
        takeover: (K, P) or (K + 1, P), of `least_squares` or `mean_takeover`.
        keep: (N,) bool, K of them True.
        dim: the axis that counts units.
    """
    by_unit = weight.movedim(dim, -1).clone()
    by_unit[:, keep] += by_unit[:, ~keep] @ takeover[: int(keep.sum())].T
    return by_unit.movedim(-1, dim)


def bias_taken_over(weight: Tensor, takeover: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Return (D,) what the projection's bias gains; the weight is that before the repair, `takeover` (K + 1, P)."""
    return weight.movedim(dim, -1)[:, ~keep] @ takeover[-1]


def least_squares(gram: Tensor, keep: Tensor, damping: float) -> Tensor:
    """Return how h of the units that go follows from those that stay with the least error: h_P = h_K @ takeover.

    Args:
        gram: (F, F) float32.
        keep: (N,) bool, True = stays.
        damping: added to the units' diagonal, as a fraction of its mean, at least 0.

    Returns:
        (K, P) float32; (K + 1, P) where there is a bias, whose row is the last.

    Raises:
        UnsolvableError: the matrix is not finite, or not positive definite.
    """
    staying = torch.cat([keep, keep.new_ones(len(gram) - len(keep))])
    among_kept = gram[staying][:, staying].double()  # of any width: float32 adds what the text does not ask for
    _damp(among_kept.diagonal()[: int(keep.sum())], gram.diagonal()[: len(keep)].double(), damping)
    return torch.cholesky_solve(gram[staying][:, ~staying].double(), _cholesky(among_kept)).float()


def mean_takeover(gram: Tensor, keep: Tensor) -> Tensor:
    """Return (K + 1, P): the bias takes over the means of the units that go, and the other units nothing.

    Args:
        gram: (N + 1, N + 1) float32, with the column of ones.
        keep: (N,) bool, True = stays.
    """
    means = gram[-1, :-1][~keep] / gram[-1, -1]
    return torch.cat([means.new_zeros(int(keep.sum()), len(means)), means[None]])


def elimination_scores(gram: Tensor, weight: Tensor, *, damping: float, rounds: int, block: int = 1) -> Tensor:
    """Take all units out, those first whose loss the others can make good, and return when and at what cost they went.

    Args:
        gram: (F, F) float32.
        weight: (D, N) what reads the units.
        damping: as of `least_squares`.
        rounds: how often costs are computed anew, at least 1; with as many as there are units they are exact.
        block: neighboring features that are one unit's.

    Returns:
        (N / block,) float32: the squared error in the projection's output, summed over tokens, that the unit adds when
        it goes.

    Raises:
        UnsolvableError: as `least_squares`.
    """
    features = weight.shape[1]
    num_units = features // block
    inverse = torch.cholesky_inverse(_cholesky(_damped(gram, features, damping)))
    weight = weight.to(inverse.dtype) * (gram.diagonal()[:features] > 0)  # what is never active goes for free
    units = torch.arange(num_units, device=gram.device)
    scores = torch.zeros(num_units, dtype=inverse.dtype, device=gram.device)
    floor = scores.new_zeros(())
    while len(units):
        costs = _costs(inverse, weight, block)
        going = costs.argsort(stable=True)[: -(-num_units // rounds)]
        scores[units[going]] = costs[going].clamp(min=floor)
        floor = scores[units[going]].amax()
        own = (going[:, None] * block + torch.arange(block, device=gram.device)).flatten()
        inverse, weight = _without(inverse, weight, own)
        staying = torch.ones_like(units, dtype=torch.bool)
        staying[going] = False
        units = units[staying]
    return scores.float()


def _costs(inverse: Tensor, weight: Tensor, block: int) -> Tensor:
    """Return what every unit would cost, (N / block,): the trace of W_I (inverse_II)^-1 W_I^T over its features I."""
    if block == 1:
        return weight.square().sum(0) / inverse.diagonal()[: weight.shape[1]]
    own = torch.arange(weight.shape[1], device=weight.device).view(-1, block)
    by_unit = weight[:, own].permute(1, 2, 0)
    factors = _cholesky(inverse[own[:, :, None], own[:, None, :]])
    return torch.linalg.solve_triangular(factors, by_unit, upper=False).square().sum((1, 2))


def _without(inverse: Tensor, weight: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    """Return inverse (F, F) and weight (D, N) of the features that stay, once they have taken over the others."""
    leaves = torch.zeros(len(inverse), dtype=torch.bool, device=inverse.device)
    leaves[going] = True
    staying = (~leaves).nonzero().flatten()
    rows = inverse[going]
    takeover = torch.linalg.solve(rows[:, going], rows[:, staying])
    still = staying[staying < weight.shape[1]]
    weight = weight[:, still].addmm_(weight[:, going], takeover[:, : len(still)], alpha=-1)
    among_staying = inverse[staying[:, None], staying]  # one copy of what is 1 GiB at N = 16,384, and changed in place
    return among_staying.addmm_(rows[:, staying].T, takeover, alpha=-1), weight


def _damped(gram: Tensor, features: int, damping: float) -> Tensor:
    """Return a copy to solve with; features that were never active get a diagonal of their own."""
    damped = gram.to(torch.float64 if len(gram) <= WIDEST_IN_DOUBLE else torch.float32, copy=True)
    diagonal = damped.diagonal()[:features]
    _damp(diagonal, diagonal, damping)
    return damped


def _damp(diagonal: Tensor, of_all: Tensor, damping: float) -> None:
    """Add a fraction of the mean of all units' diagonal to that of some; what is 0 even then becomes 1."""
    diagonal += damping * of_all.mean()
    diagonal.masked_fill_(diagonal == 0, 1.0)


def _cholesky(gram: Tensor) -> Tensor:
    """Return the lower factor of one matrix or of several.

    Raises:
        UnsolvableError: there is none.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed.any() or not factor.diagonal(dim1=-2, dim2=-1).isfinite().all():  # holds what its row adds up to
        raise UnsolvableError("the Gram matrix is not finite or not positive definite")
    return factor
