"""FAC: factors of a fixed rank, which are only fine-tuned.

Source: arXiv 1910.04732, the baseline "FAC". Every weight has the rank at which its factors have the wanted fraction of
its parameters.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from scale_prune.core import Kind, Schedule, UnitGroup, budget
from scale_prune.criteria.base import OF_COMPONENTS, Criterion


class Factorize(Criterion):
    """Keep the components that the factorization has left."""

    kind: ClassVar[Kind] = "component"
    settings = OF_COMPONENTS - {"initial_rank"}

    def components(self, shape: tuple[int, int]) -> int:
        """Return the rank that the target allows, at least 1."""
        rows, columns = shape
        full = min(shape)
        return budget(self.config.remaining * rows * columns / ((rows + columns) * full), full)

    def select(
        self, scores: Sequence[Tensor], groups: Sequence[UnitGroup], schedule: Schedule, step: int
    ) -> list[Tensor]:
        """Keep everything."""
        return [torch.ones_like(group, dtype=torch.bool) for group in scores]
