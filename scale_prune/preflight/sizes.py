"""Sizes that memory, bytes between ranks and disk all follow from."""

from torch import device

from scale_prune.criteria import CRITERIA
from scale_prune.preflight.job import FP32, PERSISTENT, REUSE_DISTANCE, Job


def kept_gathered(job: Job) -> int:
    """Return the elements that stay gathered from the forward to the backward pass.

    ZeRO-3 keeps what it uses again within `stage3_max_reuse_distance` elements: on the way to the end of the forward
    pass and back, that is the last half of this distance.
    """
    return min(job.num_parameters, job.zero("stage3_max_reuse_distance", REUSE_DISTANCE) // 2)


def persistent(job: Job) -> int:
    """Return the elements of the small parameters that stay gathered always."""
    threshold = job.zero("stage3_param_persistence_threshold", PERSISTENT)
    return sum(numel for numel in job.rehearsed.numels if numel <= threshold)


def needs(job: Job, what: str) -> bool:
    """Tell whether the criterion needs something, where units leave."""
    return job.pruning.remaining < 1 and what in CRITERIA[job.pruning.criterion].needs


def criterion_state(job: Job) -> int:
    """Return the bytes of what the criterion knows of a rank's own units."""
    criterion = CRITERIA[job.pruning.criterion](job.pruning, seed=0)
    state = criterion.initial_state(job.layout.owned_spans(0), device("cpu"))
    return sum(tensor.nbytes for tensor in state.values())


def products(job: Job) -> int:
    """Return the bytes of the running sums of products: N numbers for each owned unit."""
    if not needs(job, "activation") or job.pruning.similarity != "running":
        return 0
    return sum(FP32 * (span.last - span.first + 1) * span.group.num_units for span in job.layout.owned_spans(0))


def sampled_tokens(job: Job) -> int:
    """Return the tokens that a rank samples."""
    passes = job.world_size * job.accumulation
    return -(-job.pruning.similarity_tokens // passes) * job.accumulation
