"""The dense model's units while rounds make them fewer: which are left, and the last scores of all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_prune.core import UnitGroup
from scale_prune.pruning.pruner import Pruner


class DenseUnits:
    """What earlier rounds have left of the dense model's units.

    Args:
        groups: the dense model's groups.

    Attributes:
        kept: (N,) bool on the CPU of each group: the units that the present pruner has.
        scores: (N,) float32 on the CPU of each group: the scores of the others when they left.
    """

    def __init__(self, groups: Sequence[UnitGroup]) -> None:
        self.groups = tuple(groups)
        self.kept = [torch.ones(group.num_units, dtype=torch.bool) for group in groups]
        self.scores = [torch.zeros(group.num_units) for group in groups]

    @property
    def untouched(self) -> bool:
        """Whether no earlier round has removed anything."""
        return all(bool(kept.all()) for kept in self.kept)

    def masks_with(self, pruner: Pruner) -> list[Tensor]:
        """Return which of the dense model's units the present pruner keeps, (N,) bool a group."""
        return self._merged(self.kept, pruner.masks)

    def scores_with(self, pruner: Pruner) -> list[Tensor]:
        """Return the last scores of the dense model's units, (N,) float32 a group."""
        return self._merged(self.scores, pruner.scores)

    def leave_to_next(self, pruner: Pruner) -> None:
        """Take note of what a pruner keeps, before another one goes on with that."""
        self.scores, self.kept = self.scores_with(pruner), self.masks_with(pruner)

    def _merged(self, dense: Sequence[Tensor], present: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(dense, self.kept, present, strict=True)
        return [line.clone().masked_scatter_(kept, values.to(line)) for line, kept, values in pairs]
