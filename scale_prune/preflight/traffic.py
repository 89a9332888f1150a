"""What a run sends: the bytes that a rank receives in an optimizer step, by purpose.

Plain arithmetic on shapes and settings; what a round sends is `round_needs`'s.
"""

from scale_prune.criteria import freezes
from scale_prune.preflight.job import FP32, Job
from scale_prune.preflight.sizes import kept_gathered, needs, persistent, sampled_tokens


def communication(job: Job) -> dict[str, int]:
    """Return the bytes that a rank receives in an optimizer step, by purpose.

    A collective over W ranks hands each rank the (W - 1) / W of its numbers that the rank did not have. Parameters are
    gathered for the forward and for the backward pass of every micro batch, but for those that stay gathered between
    the two; small ones once a step.
    """
    small = persistent(job)
    passes = 2 * (job.num_parameters - small) - max(kept_gathered(job) - small, 0)
    received = {
        "ZeRO-3, parameters": (job.accumulation * passes + small) * job.width,
        "ZeRO-3, gradients": job.accumulation * job.num_parameters * job.width,
        "pruning, shares": FP32 * job.layout.padded * any(needs(job, each) for each in ("grad", "influence", "gate")),
        "pruning, gates": FP32 * job.layout.padded if needs(job, "gate") else 0,
        "pruning, at an update of the masks": _update(job),
        "pruning, at a sample of activations": _received_sample(job),
    }
    if freezes(job.pruning):  # the dense model's pass, the gated one's, and back
        received["ZeRO-3, parameters"] = job.accumulation * (3 * job.num_parameters * job.width)
        received["ZeRO-3, gradients"] = 0
    elif not job.trains:
        received = {name: size * job.recovers for name, size in received.items() if name.startswith("ZeRO-3")}
    return {name: size * (job.world_size - 1) // job.world_size for name, size in received.items()}


def _received_sample(job: Job) -> int:
    """Return the bytes of all samples of the groups that the busiest rank owns units of, or of the sums over them."""
    if not needs(job, "activation"):
        return FP32 * job.layout.padded if needs(job, "activity") and not job.pruning.rounds else 0
    spans = [job.layout.owned_spans(rank) for rank in range(job.world_size)]
    features = max(sum(span.group.num_features for span in own) for own in spans)
    return sampled_tokens(job) * job.world_size * features * job.width


def _update(job: Job) -> int:
    """Return the bytes of scores gathered, of the read-back, and of shares that are taken only then."""
    if job.pruning.remaining == 1 or job.pruning.rounds:
        return 0
    shares = needs(job, "weight") and not needs(job, "grad")
    return FP32 * job.layout.padded * (3 + shares)
