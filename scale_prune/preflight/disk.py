"""What a run writes: the bytes of a checkpoint and of the exported model."""

from math import prod

from scale_prune.preflight.job import FP32, Job
from scale_prune.preflight.sizes import criterion_state, products


def export_size(job: Job, layout: str) -> int:
    """Return the bytes of the exported weights, at most: padding may reach up to the dense widths.

    Beside a GGUF file there is a folder; components are multiplied out in the file, and in layout "uniform".
    """
    factorized = [group for group in job.groups if group.kind == "component"]
    factors = sum(prod(member.shape) for group in factorized for member in group.members)
    dense = job.num_parameters - factors + sum(group.dense_cost for group in factorized)
    elements = {"pad": dense, "uniform": dense if factorized else job.num_pruned, "gguf": job.num_pruned + dense}
    return elements.get(layout, job.num_pruned) * job.width


def checkpoint_size(job: Job) -> int:
    """Return the bytes of a checkpoint of all ranks: masters and moments; masks, scores, and the criterion's state.

    Where nothing is trained before the units leave, masters are those of the smaller model.
    """
    replicated = job.layout.num_units * (FP32 + 1)
    sharded = criterion_state(job) + products(job) + FP32 * job.layout.per_rank  # similarity
    trained = job.num_parameters if job.trains else job.num_pruned * job.recovers
    return trained * FP32 * (1 + job.moments) + replicated + job.world_size * sharded
