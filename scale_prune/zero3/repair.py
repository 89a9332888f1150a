"""The repair of sharded weights: each rank takes its slice of what the survivors' weights become."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from scale_prune.core import UnitGroup
from scale_prune.core.repair import bias_taken_over, taken_over
from scale_prune.pruning import keeper_of
from scale_prune.zero3.backend import Zero3Backend
from scale_prune.zero3.engine_state import write_working_copy
from scale_prune.zero3.shard import MASTER, Shard


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
    for index, (group, units) in enumerate(zip(groups, masks, strict=True)):
        if not units.all():
            mask = group.by_feature(units)
            bias = f"{group.output}.bias"
            has_bias = bias in backend.parameters
            takeover = takeovers.get(index, torch.empty(int(mask.sum()) + has_bias, int((~mask).sum())))
            takeover = takeover.to(backend.device).contiguous()  # a solver leaves columns behind one another
            dist.broadcast(takeover, keeper_of(index, backend))
            member = next(member for member in group.members if member.role == "out")
            weight = _whole(backend, member.name)
            if has_bias:
                _set(backend, bias, _whole(backend, bias) + bias_taken_over(weight, takeover, mask, member.dim))
            _set(backend, member.name, taken_over(weight, takeover, mask, member.dim))
    if backend.trains:
        write_working_copy(backend)


def _whole(backend: Zero3Backend, name: str) -> Tensor:
    """Return a parameter in float32, the master where there is one. A collective."""
    param: Any = backend.parameters[name]
    if backend.trains:
        full: Tensor = safe_get_full_fp32_param(param)
        return full
    with GatheredParameters([param]):
        return param.detach().float().clone()


def _set(backend: Zero3Backend, name: str, whole: Tensor) -> None:
    """Write a parameter's new values into this rank's slice. Without an optimizer a collective."""
    param: Any = backend.parameters[name]
    if backend.trains:
        shard = Shard(param)
        shard.write(MASTER, whole.flatten()[shard.start : shard.start + shard.count])
        return
    with GatheredParameters([param], modifier_rank=0):
        if backend.rank == 0:
            param.data.copy_(whole)
