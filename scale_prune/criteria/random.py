"""Gradual random pruning: a frozen random order in each group, the control that every criterion must beat.

Source: arXiv 2302.03773, the baseline "gradual random".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_prune.core import UnitSpan, generator_of
from scale_prune.criteria.base import Criterion, State


class Random(Criterion):
    """Keep units in a random order that depends on the seed and the group's name alone, not on the number of ranks."""

    grows = 0.0

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Draw every span's part of its group's order."""
        return {"total": torch.cat([self._order(span) for span in spans] or [torch.zeros(0)]).to(device)}

    def _order(self, span: UnitSpan) -> Tensor:
        order = torch.randperm(span.group.num_units, generator=generator_of(self.seed, span.group.name))
        return order[span.first : span.last].float() / span.group.num_units
