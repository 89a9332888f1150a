"""How much the units of a group repeat each other: cosines, correlations, nearest neighbors, explained variance.

Everything follows from sums over tokens, of which a rank keeps the rows of the units it owns, against all units or
against a sample of them.

Shape legend: T tokens, N units of a group, R the rows (units) that are kept here, K sampled units (all of them, K = N,
unless a sample is asked for).

Source: arXiv 2302.03773, section 5: a unit is similar if some later unit has a signed cosine of at least 0.8 to it;
uniqueness is the share of units that are not. The rest goes beyond the paper.
"""

import torch
from torch import Tensor

SIMILAR = 0.8
RIDGE = 1e-6  # of the mean variance, so that units which repeat each other exactly do not stop the solver


class Products:
    """Sums over tokens of h_i * h_j, for units i of [first, last) and sampled units j, and of h and h^2 of all units.

    Memory: 4 * (R * K + 2 * N) bytes; twice R * K more while cosines are made.

    Args:
        num_units: N.
        first: first unit that is kept here.
        last: one past the last.
        sample: (K,) ascending numbers of the sampled units, on the device where the sums will be.
    """

    def __init__(self, num_units: int, first: int, last: int, sample: Tensor) -> None:
        self.first, self.last, self.sample = first, last, sample
        self.count = 0
        self.products = torch.zeros(last - first, len(sample), device=sample.device)
        self.sums = torch.zeros(num_units, device=sample.device)
        self.squares = torch.zeros(num_units, device=sample.device)

    def update(self, activations: Tensor) -> None:
        """Take in the (T, N) activations of some tokens."""
        h = activations.float()
        self.count += int(h.any(1).sum())  # rows of zeros fill up what ranks have less
        self.products += h[:, self.first : self.last].T @ h[:, self.sample]
        self.sums += h.sum(0)
        self.squares += h.square().sum(0)

    def cosines(self) -> Tensor:
        """Return (R, K) signed cosines over all tokens; 0 where a unit never fires, and of a unit to itself."""
        return self._normalized(self.products.clone(), self.squares)

    def correlations(self) -> Tensor:
        """Return (R, K) correlations, cosines of centered activations; 0 to itself, and where a unit is constant."""
        means = self.sums / max(self.count, 1)
        centered = self.products - self.count * means[self.first : self.last, None] * means[self.sample]
        variances = (self.squares - self.count * means.square()).clamp(min=0)
        return self._normalized(centered, torch.where(variances > 1e-6 * self.squares, variances, 0.0))

    def _normalized(self, products: Tensor, squares: Tensor) -> Tensor:
        norms = squares.sqrt()
        inverse = torch.where(norms > 0, 1.0 / norms, 0.0)
        products *= inverse[self.sample]
        products *= inverse[self.first : self.last, None]
        here = (self.sample >= self.first) & (self.sample < self.last)
        products[self.sample[here] - self.first, here.nonzero().flatten()] = 0.0
        return products


def sample_units(num_units: int, size: int | None, seed: int) -> Tensor:
    """Draw units without replacement, the same ones for the same seed.

    Args:
        num_units: N.
        size: K, at least 2; None or more than N for all units.
        seed: of the draw.

    Returns:
        (K,) int64, ascending.
    """
    if size is None or size >= num_units:
        return torch.arange(num_units)
    order = torch.randperm(num_units, generator=torch.Generator().manual_seed(seed))
    return order[:size].sort().values


def has_similar(cosines: Tensor, first: int, sample: Tensor) -> Tensor:
    """Tell which sampled units have, among some rows, a later unit whose signed cosine to them reaches SIMILAR.

    Args:
        cosines: (R, K) of units first, first + 1, ... to the sampled units.
        first: number of the unit in row 0.
        sample: (K,) numbers of the sampled units.

    Returns:
        (K,) bool; over disjoint rows the whole answer is whether any of them says so.
    """
    rows = torch.arange(first, first + len(cosines), device=cosines.device)
    return ((cosines >= SIMILAR) & (rows[:, None] > sample)).any(0)


def nearest(cosines: Tensor) -> Tensor:
    """Return (K,) the largest |cosine| of each sampled unit to one of the rows; of disjoint rows the maximum counts."""
    return torch.maximum(cosines.amax(0), -cosines.amin(0))


def mean_absolute(cosines: Tensor, live: Tensor, first: int, sample: Tensor) -> Tensor:
    """Return (R,) the mean |cosine| of each row's unit to the other live sampled units; 0 where there is none.

    Over the draw of the sample this is an unbiased estimate of the mean over all other live units.

    Args:
        cosines: (R, K), 0 of a unit to itself.
        live: (N,) bool.
        first: number of the unit in row 0.
        sample: (K,) numbers of the sampled units.
    """
    sampled_live = torch.zeros_like(live)
    sampled_live[sample] = live[sample]
    others = sampled_live.sum() - sampled_live[first : first + len(cosines)].long()
    return cosines.abs() @ live[sample].to(cosines.dtype) / others.clamp(min=1)


def explained_variance(covariances: Tensor) -> Tensor:
    """Return for each of some units how much of its variance a linear combination of the others explains, R^2.

    Args:
        covariances: (K, K) of their activations; K may be 0.

    Returns:
        (K,) in [0, 1]; 0 for a unit without variance.
    """
    variances = covariances.diagonal().double()
    if not len(variances):
        return variances.float()
    varying = variances > 1e-12 * variances.amax().clamp(min=1e-300)
    kept = covariances.double()[varying][:, varying]
    ridge = RIDGE * kept.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64, device=kept.device)
    unexplained = 1.0 / torch.linalg.inv(kept + ridge).diagonal()
    explained = torch.zeros_like(variances)
    explained[varying] = (1 - unexplained / kept.diagonal()).clamp(0, 1)
    return explained.float()
