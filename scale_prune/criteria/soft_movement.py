"""Soft movement: a unit stays while sigmoid(S) is above a rising threshold; the score penalty makes the sparsity.

Source: arXiv 2302.03773, the baseline "soft movement"; structured soft movement is arXiv 2109.04838. The threshold
tau rises from 0 to 0.1 on the cubic schedule, lambda(t) = lambda_f * tau(t) / tau_f, and at least the fraction v(t) of
every group stays.
A unit passes below the threshold only at S < -2.2 (sigmoid 0.1), which Adam reaches after 220 full steps at the default
score learning rate: runs of a few hundred steps need a larger one, or they are cut to the target all at once.
Deviation: from the cool-down on, exactly the target stays (the highest scores), so that results at one target compare.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from scale_prune.core import Schedule, UnitGroup
from scale_prune.criteria.base import Moment
from scale_prune.criteria.movement import Movement

FINAL_THRESHOLD = 0.1


class SoftMovement(Movement):
    """Keep the units whose trained score is above the threshold."""

    defaults: ClassVar[dict[str, Any]] = Movement.defaults | {"regularization": 100.0}

    def penalty_schedule(self, moment: Moment) -> float:
        """Return lambda(t) / lambda_f = tau(t) / tau_f: the penalty rises with the threshold."""
        return moment.schedule.progress(moment.step)

    def select(
        self, scores: Sequence[Tensor], groups: Sequence[UnitGroup], schedule: Schedule, step: int
    ) -> list[Tensor]:
        """Choose by threshold during the descent, by budget from its end on."""
        floors = super().select(scores, groups, schedule, step)
        if step >= schedule.last_descent_step:
            return floors
        threshold = FINAL_THRESHOLD * schedule.progress(step)
        return [floor | (group.sigmoid() > threshold) for floor, group in zip(floors, scores, strict=True)]
