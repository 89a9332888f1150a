"""What leaves at once, and not under masks: scores by calibration text, and the choice that follows from them."""

import torch
from torch import Tensor

from scale_prune.pruning.calibration import Calibration, gram_scores
from scale_prune.pruning.pruner import Pruner


@torch.no_grad()
def take_calibration(pruner: Pruner, calibration: Calibration) -> None:
    """Let a pruner take in what calibration text says, as far as its criterion asks for it. A collective.

    Raises:
        ValueError: a Gram matrix cannot be solved.
    """
    scoring = pruner.scoring
    with pruner.seconds.measure("scoring"):
        scoring.state = pruner.observations.take_calibration(scoring.state, calibration)
        if "gram" in scoring.criterion.needs:
            scoring.take_ranks(gram_scores(calibration, scoring.criterion.rank_units))


@torch.no_grad()
def rate(pruner: Pruner) -> list[Tensor]:
    """Bring a pruner's scores up to date, and return them, (N,) a group. A collective.

    Raises:
        ValueError: scores cannot be ranked.
    """
    return pruner.scoring.rate()


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
