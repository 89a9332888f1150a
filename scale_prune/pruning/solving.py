"""What is solved for with the Gram matrices of a calibration, layer by layer on the ranks that keep them.

A matrix that cannot be solved on one rank is an error on all.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scale_prune.core import UnitGroup, UnsolvableError, gram_root, least_squares, mean_takeover
from scale_prune.core.repair import in_metric
from scale_prune.pruning.backend import ShardBackend
from scale_prune.pruning.calibration import Calibration, keeper_of, side_by_side

UNSOLVED = (UnsolvableError, torch.linalg.LinAlgError)


def gram_scores(calibration: Calibration, rank_units: Callable[[Tensor, Tensor, int], Tensor]) -> dict[int, Tensor]:
    """Return (N,) scores by number of the group, of the groups that this rank keeps. A collective.

    The weights that read a group's units are gathered as in a forward pass, those of W groups before they are ranked.

    Args:
        calibration: with Gram matrices.
        rank_units: (F, F) Gram matrix, (D, features) float32 weight and features a unit to (N,) scores.

    Raises:
        ValueError: a Gram matrix cannot be solved.
    """
    backend, groups = calibration.backend, calibration.groups
    scores: dict[int, Tensor] = {}
    failed = torch.zeros(len(groups), device=backend.device)
    for together in side_by_side(calibration.portion, backend.world_size):
        weights = {index: _output_weight(backend, groups[index], index) for index in together}
        for index, weight in weights.items():
            if weight is not None:
                try:
                    if index in calibration.output_grams:
                        weight = in_metric(weight, calibration.output_grams[index])
                    scores[index] = rank_units(calibration.grams[index], weight, groups[index].block)
                except UNSOLVED:
                    failed[index] = 1
    _raise_together(backend, groups, failed)
    return scores


def takeovers_of(
    calibration: Calibration, masks: Sequence[Tensor], repair: str, damping_of: Callable[[int], float]
) -> dict[int, Tensor]:
    """Solve for what the units that stay take over, in the groups that this rank keeps. A collective.

    Args:
        calibration: with Gram matrices.
        masks: (N,) bool a group, True = stays.
        repair: "least_squares", or "mean" where the projections have biases.
        damping_of: of `least_squares`, by the features of the matrix.

    Returns:
        (K, P) or (K + 1, P) by number of the group, of K features that stay and P that go.

    Raises:
        ValueError: a Gram matrix cannot be solved.
    """

    def solve(index: int, gram: Tensor) -> Tensor:
        keep = calibration.groups[index].by_feature(masks[index])
        return mean_takeover(gram, keep) if repair == "mean" else least_squares(gram, keep, damping_of(len(gram)))

    return _solved(calibration, solve, [index for index in calibration.grams if not masks[index].all()])


def roots_of(calibration: Calibration, damping: float) -> dict[str, Tensor]:
    """Return (N, N) roots of the Gram matrices that this rank keeps, by the group's name. A collective.

    Raises:
        ValueError: a Gram matrix has none.
    """
    groups = calibration.groups

    def root(index: int, gram: Tensor) -> Tensor:
        return gram_root(gram, groups[index].num_features, damping)

    return {groups[index].name: each for index, each in _solved(calibration, root, list(calibration.grams)).items()}


def _solved(
    calibration: Calibration, solve: Callable[[int, Tensor], Tensor], indices: Sequence[int]
) -> dict[int, Tensor]:
    """Solve for some of the Gram matrices that this rank keeps. A collective.

    Raises:
        ValueError: one cannot be solved, on whichever rank.
    """
    solved: dict[int, Tensor] = {}
    failed = torch.zeros(len(calibration.groups), device=calibration.backend.device)
    for index in indices:
        try:
            solved[index] = solve(index, calibration.grams[index])
        except UNSOLVED:
            failed[index] = 1
    _raise_together(calibration.backend, calibration.groups, failed)
    return solved


def _output_weight(backend: ShardBackend, group: UnitGroup, index: int) -> Tensor | None:
    """Return the (D, features) float32 weight that reads the units, on the rank that keeps the group. A collective."""
    member = next(member for member in group.members if member.role == "out")
    weight = backend.gather(member.name)
    return weight.movedim(member.dim, -1) if keeper_of(index, backend) == backend.rank else None


def _raise_together(backend: ShardBackend, groups: Sequence[UnitGroup], failed: Tensor) -> None:
    """Raise on all ranks where one has failed. A collective.

    Raises:
        ValueError: with the group's name.
    """
    anywhere = backend.all_gather(failed).view(-1, len(groups)).amax(0).nonzero().flatten().tolist()
    if anywhere:
        raise ValueError(
            f"the Gram matrix of the activations of {groups[anywhere[0]].name} is not finite or not positive definite; "
            "give a larger --repair_damping or more --calibration_tokens, or look for activations that overflow"
        )
