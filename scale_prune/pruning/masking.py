"""Masks: which units remain, and the proof that no others are at work in what the forward pass uses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scale_prune.core import Member, remaining_fraction
from scale_prune.criteria import ShardView
from scale_prune.pruning.unit_line import UnitLine


class Masking:
    """The masks of a run; everything remains at the start.

    Args:
        line: the units.

    Attributes:
        masks: one (N,) bool tensor a group, True = keep; the same on all ranks.
        widths: units that remain in each group.
        churn: units whose mask changed in the last update.
    """

    def __init__(self, line: UnitLine) -> None:
        self.line = line
        self.churn = 0
        self.put(line.by_group(line.per_unit(lambda group: 1.0).bool()))

    def put(self, masks: Sequence[Tensor]) -> None:
        """Make these the masks, one (N,) bool a group; they are not on the working copy before `apply`."""
        self.masks = list(masks)
        self.widths = torch.stack([mask.sum() for mask in masks]).tolist()

    def update(self, masks: Sequence[Tensor]) -> None:
        """Make these the masks, and count the units that they change."""
        self.churn = int((torch.cat([*masks]) != self.live).sum())
        self.put(masks)

    @property
    def live(self) -> Tensor:
        """The masks in one (M,) line."""
        return torch.cat(self.masks)

    @property
    def by_name(self) -> dict[str, Tensor]:
        """The masks by the names of their groups."""
        return {group.name: mask for group, mask in zip(self.line.groups, self.masks, strict=True)}

    @property
    def remaining(self) -> float:
        """The fraction that remains: of neurons, or of parameters where components are removed."""
        return remaining_fraction(self.line.groups, self.widths)

    def apply(self) -> None:
        """Zero the removed units in the working copy. No communication."""
        skipped = not self.line.backend.step_applied()  # and the working copy as the masks before have made it
        for group, mask, width in zip(self.line.groups, self.masks, self.widths, strict=True):
            if width < group.num_units or skipped:
                self.line.backend.mask_working_copy(group, mask, anew=skipped)

    def verify(self, step: int) -> None:
        """Read the working copy back: exactly the masked units must be zero, apart from units whose master is zero.

        A collective, 8 M bytes.

        Args:
            step: optimizer steps made, for the message.

        Raises:
            RuntimeError: they are not; the message names the group. The same on all ranks.
        """
        backend = self.line.backend
        read = self._zero(backend.working)
        if torch.equal(read, ~self.live):
            return
        born_zero = self._zero(lambda member: backend.master(member, grad=False))
        lines = (self.line.by_group(line) for line in (read, born_zero))
        for group, mask, zero, born in zip(self.line.groups, self.masks, *lines, strict=True):
            if not torch.equal(zero, ~mask | born):
                raise RuntimeError(
                    f"step {step}: the masks of group {group.name} did not take hold in the working copy: of "
                    f"{group.num_units} units {int(zero.sum())} read back as zero, {int((~mask | born).sum())} should"
                )

    def _zero(self, source: Callable[[Member], ShardView]) -> Tensor:
        """Tell which units are all zero, (M,) bool on all ranks: their absolute values add up to 0."""

        def share(member: Member) -> Tensor:
            view = source(member)
            return view.unit_sum(view.weight.abs())

        return self.line.gather(self.line.totals(share)) == 0
