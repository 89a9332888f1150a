"""What leaves at once, and not under masks: scores by calibration text, and the choice that follows from them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from scale_prune.pruning.calibration import Calibration
from scale_prune.pruning.pruner import Pruner
from scale_prune.pruning.solving import gram_scores


def take_calibration(pruner: Pruner, calibrations: Iterable[Calibration]) -> Calibration | None:
    """Let a pruner take in what calibration text says, as far as its criterion asks for it. A collective.

    Args:
        pruner: of the units that are left.
        calibrations: readings of the text, each with another portion of the Gram matrices; activities are the first's.

    Returns:
        The last of them.

    Raises:
        ValueError: a Gram matrix cannot be solved.
    """
    scoring, ranked, calibration = pruner.scoring, dict[int, Tensor](), None
    for calibration in calibrations:
        with pruner.seconds.measure("scoring"), torch.no_grad():  # the next reading may need gradients
            if calibration.activities:
                scoring.state = pruner.observations.take_calibration(scoring.state, calibration)
            if "gram" in scoring.criterion.needs:
                ranked |= gram_scores(calibration, scoring.criterion.rank_units)
    if "gram" in scoring.criterion.needs:
        scoring.take_ranks(ranked)
    return calibration


@torch.no_grad()
def choose(pruner: Pruner, step: int) -> None:
    """Choose the units that leave after a step; the masks are not on the working copy after this. A collective.

    Args:
        pruner: of the units that are left.
        step: one of the schedule's removal steps.

    Raises:
        ValueError: scores cannot be ranked.
    """
    with pruner.seconds.measure("scoring"):
        pruner.masking.update(pruner.scoring.choose(step))
