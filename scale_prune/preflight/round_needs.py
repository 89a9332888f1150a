"""What a round needs, or a repair at the end: memory of a rank, bytes between ranks, arithmetic.

Shape letters: N units of a group, F features, N or N + 1, K units that stay, P units that go, D outputs, W ranks.
"""

from collections.abc import Callable
from math import prod

from scale_prune.core.level_table import TRIAL_TOKENS, num_trials
from scale_prune.core.repair import WIDEST_IN_DOUBLE
from scale_prune.criteria import CRITERIA, observes, repairs_masks
from scale_prune.criteria.base import members_of_shares
from scale_prune.preflight.job import FP32, Job
from scale_prune.pruning import ROWS_AT_ONCE

GRAM_MATRICES = "Gram matrices"
THERE, THERE_AND_BACK = 2, 4
"""Operations of a pass, a token and a parameter, which gets no gradient; recomputing is another pass."""


def num_observed(job: Job) -> int:
    """Return the elements of a rank's shards whose gradients are kept though no step follows."""
    if not observes(job.pruning, trains=job.trains):
        return 0
    members = members_of_shares(CRITERIA[job.pruning.criterion], job.groups)
    return sum(job.shard_of(prod(member.shape)) for member in members)


def reads(job: Job) -> bool:
    """Tell whether the calibration text is read in a round, or for a repair at the end."""
    by_activity = "activity" in CRITERIA[job.pruning.criterion].needs or job.pruning.budget == "redundancy"
    return solves(job) or (job.removals > 0 and bool(job.pruning.rounds) and by_activity)


def solves(job: Job) -> bool:
    """Tell whether Gram matrices are made."""
    repairs = job.pruning.repair not in (None, "none")
    return job.removals > 0 and (repairs or "gram" in CRITERIA[job.pruning.criterion].needs)


def tries_repair(job: Job) -> bool:
    """Tell whether a repair at the end of masks is tried."""
    return job.removals > 0 and repairs_masks(job.pruning)


def round_memory(job: Job) -> dict[str, int]:
    """Return the bytes that a round adds on the rank that keeps the most groups, by purpose.

    While a group is ranked there are about three matrices of its size, in float64 where it is not too wide; while it is
    solved for two of what stays, and two of what goes, in float64.
    """
    if not solves(job):
        return {}
    widths = [group.num_features + 1 for group in job.groups]
    widest, of_gradients = max(widths), _gradient_features(job)
    all_taken_over = _busiest(job, lambda width: _taken_over(job, width)) if tries_repair(job) else 0
    exact = 2 * FP32 if widest <= WIDEST_IN_DOUBLE else FP32
    return {
        GRAM_MATRICES: FP32 * int(_busiest(job, lambda width: width**2 + of_gradients)),
        "solving, or a block of sums": max(
            3 * exact * widest**2 if "gram" in CRITERIA[job.pruning.criterion].needs else 0,
            4 * FP32 * _kept(job, widest) * widest,
            2 * FP32 * min(ROWS_AT_ONCE, widest) * widest,
        ),
        "what is taken over": FP32 * int(max(2 * _taken_over(job, widest), all_taken_over)),
        "a gathered weight": 3 * FP32 * max(_output_weights(job)),
    }


def one_gram_matrix(job: Job) -> int:
    """Return the bytes of the Gram matrices of the widest group, which a rank keeps at least."""
    return FP32 * max((group.num_features + 1) ** 2 + _gradient_features(job) for group in job.groups)


def whitening_memory(job: Job) -> dict[str, int]:
    """Return the bytes on the rank that keeps the most Gram matrices of what factorized weights read, by purpose."""
    widths = [group.members[0].shape[1] for group in job.groups if group.kind == "component"]
    if not widths or job.pruning.factors != "whitened":
        return {}
    own, widest = -(-len(widths) // job.world_size), max(widths)
    exact = 2 * FP32 if widest <= WIDEST_IN_DOUBLE else FP32
    return {GRAM_MATRICES: own * FP32 * widest**2, "roots": own * exact * widest**2}


def trials(job: Job) -> int:
    """Return how many trials the first round makes to find a budget."""
    if job.pruning.budget not in ("measured", "search"):
        return 0
    measured = [] if job.pruning.table else [group.num_units for group in job.groups]
    return num_trials(measured, search=job.pruning.budget == "search")


def trial_passes(job: Job, tokens: int) -> int:
    """Return the forward passes of a rank in a trial, of a calibration text of so many tokens."""
    blocks = job.calibration_steps * int(job.ds_config["train_batch_size"])
    rows = -(-TRIAL_TOKENS * blocks // tokens)
    return -(-min(rows, blocks) // (int(job.ds_config["train_batch_size"]) // job.accumulation))


def round_bytes(job: Job, tokens: int) -> dict[str, int]:
    """Return the bytes that a rank receives in a round, by purpose, at the widths of the dense model.

    Args:
        job: the run.
        tokens: of the calibration text, over all ranks.
    """
    passes, observed = job.calibration_steps * job.accumulation, observes(job.pruning, trains=job.trains)
    received = {
        "gradients, parameters": passes * 2 * job.num_parameters * job.width * observed,
        "gradients, of weights": passes * FP32 * num_observed(job) * job.world_size,
        "gradients, shares": job.calibration_steps * FP32 * job.layout.padded * observed,
    }
    readings = (2 if _gradient_features(job) else 1) * reads(job) + 2 * tries_repair(job)
    received |= {
        "calibration, parameters": passes * job.num_parameters * job.width * readings,
        "budget, parameters": trials(job) * trial_passes(job, tokens) * job.num_parameters * job.width,
    }
    if solves(job):
        received |= _bytes_of_matrices(job, passes)
    return {name: size * (job.world_size - 1) // job.world_size for name, size in received.items()}


def _bytes_of_matrices(job: Job, passes: int) -> dict[str, int]:
    """Return how many bytes of all ranks' move for the sake of Gram matrices, by purpose."""
    widths, weights = [group.num_features + 1 for group in job.groups], _output_weights(job)
    features = _gradient_features(job)
    chooses = "gram" in CRITERIA[job.pruning.criterion].needs
    return {
        "calibration, Gram matrices": passes * FP32 * sum(width**2 + features for width in widths),
        "choice, weights": sum(weights) * job.width if chooses else 0,
        "repair, what is taken over": FP32 * sum(_taken_over(job, width) for width in widths),
        "repair, weights": FP32 * sum(weights),
    }


def round_operations(job: Job, tokens: int) -> dict[str, float]:
    """Return the multiplications and additions of a round on the rank that does the most, by purpose.

    Args:
        job: the run.
        tokens: of the calibration text, over all ranks.
    """
    observed = observes(job.pruning, trains=job.trains)
    back = THERE_AND_BACK + THERE * job.recomputes
    of_a_token = back * job.num_parameters * observed + THERE * num_observed(job) * job.world_size
    in_trial = min(TRIAL_TOKENS, tokens // (job.calibration_steps * job.accumulation * job.world_size))  # of a rank
    reading = (back if _gradient_features(job) else THERE) * reads(job) + 2 * THERE * tries_repair(job)
    counted = {
        "gradients, passes": of_a_token * tokens / job.world_size,
        "calibration, passes": reading * job.num_parameters * tokens / job.world_size,
        "budget, passes": trials(job) * trial_passes(job, tokens) * 2 * job.num_parameters * in_trial,
    }
    return counted | (_operations_of_matrices(job, tokens) if solves(job) else {})


def _operations_of_matrices(job: Job, tokens: int) -> dict[str, float]:
    """Return the multiplications and additions for the sake of Gram matrices, by purpose."""
    widths = [group.num_features + 1 for group in job.groups]
    features = _gradient_features(job)
    return {
        "calibration, Gram matrices": 2 * tokens * sum(width**2 + features for width in widths) / job.world_size,
        "choice": _busiest(job, lambda width: 4 * width**3) if "gram" in CRITERIA[job.pruning.criterion].needs else 0,
        "repair": _busiest(job, lambda width: _solving(_kept(job, width), width)),
    }


def _busiest(job: Job, of: Callable[[int], float]) -> float:
    """Return the most that a rank has of something that follows from the features of the groups that it keeps."""
    each = [of(group.num_features + 1) for group in job.groups]
    return max(sum(each[rank :: job.world_size]) for rank in range(min(job.world_size, len(each))))


def _solving(kept: int, width: int) -> float:
    return kept**3 / 3 + 2 * kept**2 * (width - kept)


def _gradient_features(job: Job) -> int:
    """Return the elements of a Gram matrix of gradients, D * D, 0 where none is made."""
    if "output_grad" not in CRITERIA[job.pruning.criterion].needs:
        return 0
    output = next(member for member in job.groups[0].members if member.role == "out")
    return output.shape[1 - output.dim] ** 2


def _kept(job: Job, width: int) -> int:
    return max(round(job.pruning.remaining * width), 1)


def _taken_over(job: Job, width: int) -> int:
    """Return the elements of what the units that stay take over in a group, K * P."""
    return _kept(job, width) * (width - _kept(job, width))


def _output_weights(job: Job) -> list[int]:
    members = [member for group in job.groups for member in group.members if member.role == "out"]
    return [prod(member.shape) for member in members]
