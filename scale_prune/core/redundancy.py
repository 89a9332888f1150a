"""How much the units of a group repeat each other: cosines, correlations, nearest neighbours, explained variance.

Everything follows from sums over tokens, of which a rank keeps the rows of the units it owns.

Shape legend: T tokens, N units of a group, R the rows (units) that are kept here, K chosen units.

Source: arXiv 2302.03773, section 5: a unit is similar if some later unit has a signed cosine of at least 0.8 to it;
uniqueness is the share of units that are not. The rest goes beyond the paper.
"""

import torch
from torch import Tensor

SIMILAR = 0.8
RIDGE = 1e-6  # of the mean variance, so that units which repeat each other exactly do not stop the solver


class Products:
    """Sums over tokens of h_i * h_j, for units i of [first, last) and all units j, and of h_j.

    Args:
        num_units: N.
        first: first unit that is kept here.
        last: one past the last.
        device: where the sums are.
    """

    def __init__(self, num_units: int, first: int, last: int, device: torch.device) -> None:
        self.first, self.last = first, last
        self.count = 0
        self.products = torch.zeros(last - first, num_units, device=device)
        self.sums = torch.zeros(num_units, device=device)
        self.squares = torch.zeros(num_units, device=device)

    def update(self, activations: Tensor) -> None:
        """Take in the (T, N) activations of some tokens."""
        h = activations.float()
        self.count += len(h)
        self.products += h[:, self.first : self.last].T @ h
        self.sums += h.sum(0)
        self.squares += h.square().sum(0)

    def cosines(self) -> Tensor:
        """Return (R, N) signed cosines over all tokens; 0 where a unit never fires."""
        return self._normalised(self.products, self.squares)

    def correlations(self) -> Tensor:
        """Return (R, N) correlations, the cosines of centred activations; 0 where a unit is constant."""
        means = self.sums / max(self.count, 1)
        centred = self.products - self.count * means[self.first : self.last, None] * means
        variances = (self.squares - self.count * means.square()).clamp(min=0)
        return self._normalised(centred, torch.where(variances > 1e-6 * self.squares, variances, 0.0))

    def _normalised(self, products: Tensor, squares: Tensor) -> Tensor:
        norms = squares.sqrt()
        inverse = torch.where(norms > 0, 1.0 / norms, 0.0)
        return products * inverse * inverse[self.first : self.last, None]


def has_similar(cosines: Tensor, first: int, threshold: float = SIMILAR) -> Tensor:
    """Tell which units have a later one whose signed cosine to them is at least the threshold.

    Args:
        cosines: (R, N) of units first, first + 1, ... to all units.
        first: number of the unit in row 0.
        threshold: in [0, 1].

    Returns:
        (R,) bool.
    """
    return (cosines >= threshold).triu(diagonal=first + 1).any(1)


def nearest(cosines: Tensor, first: int) -> Tensor:
    """Return (R,) the largest |cosine| of each unit to another one."""
    absolute = cosines.abs()
    absolute.diagonal(offset=first).zero_()
    return absolute.amax(1)


def mean_absolute(cosines: Tensor, live: Tensor, first: int) -> Tensor:
    """Return (R,) the mean |cosine| of each unit to the other live ones; 0 where there is none.

    Args:
        cosines: (R, N).
        live: (N,) bool.
        first: number of the unit in row 0.
    """
    absolute = cosines.abs()
    absolute.diagonal(offset=first).zero_()
    others = live.sum() - live[first : first + len(cosines)].long()
    return absolute @ live.to(absolute.dtype) / others.clamp(min=1)


def explained_variance(covariances: Tensor) -> Tensor:
    """Return for each of some units how much of its variance a linear combination of the others explains, R^2.

    Args:
        covariances: (K, K) of their activations.

    Returns:
        (K,) in [0, 1]; 0 for a unit without variance.
    """
    variances = covariances.diagonal().double()
    varying = variances > 1e-12 * variances.amax().clamp(min=1e-300)
    kept = covariances.double()[varying][:, varying]
    ridge = RIDGE * kept.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64, device=kept.device)
    unexplained = 1.0 / torch.linalg.inv(kept + ridge).diagonal()
    explained = torch.zeros_like(variances)
    explained[varying] = (1 - unexplained / kept.diagonal()).clamp(0, 1)
    return explained.float()
