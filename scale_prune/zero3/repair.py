"""The repair of sharded weights: each rank takes its slice of what the survivors' weights become."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from scale_prune.core import UnitGroup
from scale_prune.core.repair import bias_taken_over, taken_over
from scale_prune.pruning import keeper_of
from scale_prune.zero3.backend import Zero3Backend
from scale_prune.zero3.engine_state import write_working_copy
from scale_prune.zero3.shard import MASTER, Shard, settle


@torch.no_grad()
def repair_weights(
    backend: Zero3Backend, groups: Sequence[UnitGroup], masks: Sequence[Tensor], takeovers: Mapping[int, Tensor]
) -> None:
    """Let the units that stay take over what the others did, in masters and working copy. A collective.

    A rank receives what was solved for a group, 4 (K + 1) P bytes, and one whole weight at a time.

    Args:
        backend: the engine; of one without an optimizer the working copy is all there is.
        groups: the groups of its model.
        masks: (N,) bool a group, True = stays.
        takeovers: (K, P) or (K + 1, P) by number of the group, on the rank that keeps the group.
    """
    for shard, values in _repaired(backend, groups, masks, takeovers, _whole):
        shard.write(MASTER, values) if backend.trains else shard.write_working(values)
    write_working_copy(backend) if backend.trains else settle()


@contextmanager
def tried(
    backend: Zero3Backend,
    groups: Sequence[UnitGroup],
    masks: Sequence[Tensor],
    takeovers: Mapping[int, Tensor] | None,
) -> Iterator[None]:
    """Let the body's forward passes go without some units; afterwards everything is as before. A collective.

    Args:
        backend: the engine.
        groups: the groups of its model.
        masks: (N,) bool a group, True = stays.
        takeovers: as of `repair_weights`; None where nothing is repaired.
    """
    backend.finish_prefetches()  # of the trial before
    changed = [(group, mask) for group, mask in zip(groups, masks, strict=True) if not mask.all()]
    names = [name for group, _ in changed for name in (*(member.name for member in group.members), _bias(group))]
    before = {name: Shard(backend.parameters[name]).working().clone() for name in names if name in backend.parameters}
    try:
        if takeovers is not None:
            for shard, values in _repaired(backend, groups, masks, takeovers, Zero3Backend.gather):
                shard.write_working(values)
        for group, mask in changed:
            backend.mask_working_copy(group, mask)
        yield
    finally:
        for name, values in before.items():
            Shard(backend.parameters[name]).write_working(values)
        settle()


def _repaired(
    backend: Zero3Backend,
    groups: Sequence[UnitGroup],
    masks: Sequence[Tensor],
    takeovers: Mapping[int, Tensor],
    whole: Callable[[Zero3Backend, str], Tensor],
) -> Iterator[tuple[Shard, Tensor]]:
    """Yield what becomes of this rank's slices of the weights, and biases, that read the groups which lose units.

    A collective.
    """
    for index, (group, units) in enumerate(zip(groups, masks, strict=True)):
        if units.all():
            continue
        mask, bias = group.by_feature(units), _bias(group)
        has_bias = bias in backend.parameters
        takeover = takeovers.get(index, torch.empty(int(mask.sum()) + has_bias, int((~mask).sum())))
        takeover = takeover.to(backend.device).contiguous()  # a solver leaves columns behind one another
        dist.broadcast(takeover, keeper_of(index, backend))
        member = next(member for member in group.members if member.role == "out")
        weight, shard = whole(backend, member.name), Shard(backend.parameters[member.name])
        if has_bias:
            of_bias = Shard(backend.parameters[bias])
            repaired = whole(backend, bias) + bias_taken_over(weight, takeover, mask, member.dim)
            yield of_bias, repaired[of_bias.start : of_bias.start + of_bias.count]
        yield shard, _own_slice(shard, weight, takeover, mask, member.dim)


def _own_slice(shard: Shard, weight: Tensor, takeover: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Return what becomes of this rank's slice of a weight; where units are columns, its own rows are all it takes."""
    first, last, width = 0, len(weight), weight.shape[1]
    if dim == 1:
        first, last = shard.start // width, -(-(shard.start + shard.count) // width)
    start = shard.start - first * width
    return taken_over(weight[first:last], takeover, keep, dim).flatten()[start : start + shard.count]


def _bias(group: UnitGroup) -> str:
    return f"{group.output}.bias"


def _whole(backend: Zero3Backend, name: str) -> Tensor:
    """Return a parameter in float32, the master where there is one. A collective."""
    if not backend.trains:
        return backend.gather(name)
    full: Tensor = safe_get_full_fp32_param(backend.parameters[name])
    return full
