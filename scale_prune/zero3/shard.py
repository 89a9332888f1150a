"""What ZeRO-3 keeps of one parameter on this rank: a slice of its master, moments, gradient and working copy.

Facts relied on, each held by a test: a shard is a flat slice of ceil(numel / W) elements; the forward pass uses
`param.ds_tensor` (or, for small parameters that stay gathered, `param.data`), which every `step` writes anew from the
float32 master; gradients can be read between `backward` and `step` at the accumulation boundary.
"""

from typing import Any

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn.functional import pad

from scale_prune.core import Member, expand_to_shard, shard_bounds

MASTER = "master"


def settle() -> None:
    """Wait for what was written into slices: DeepSpeed gathers them on a stream of its own, which does not."""
    get_accelerator().synchronize()


class Shard:
    """This rank's slice of a parameter, without the padding, which may hold anything. Nothing here communicates.

    Args:
        param: a parameter of an engine with an optimizer.

    Attributes:
        start: flat offset of the first element.
        count: how many there are, S; the last ranks may have fewer than the others, or none.
    """

    def __init__(self, param: Any) -> None:
        self.param = param
        self.start, self.count = shard_bounds(param.ds_numel, dist.get_rank(), dist.get_world_size())

    @property
    def stays_gathered(self) -> bool:
        """Whether the forward pass uses a copy of the whole parameter, which is there at present."""
        return bool(self.param.ds_status == ZeroParamStatus.AVAILABLE)

    @property
    def has_own_master(self) -> bool:
        """Whether master and working copy are two memories, so that a mask on one leaves the other as it is."""
        return bool(safe_get_local_fp32_param(self.param).data_ptr() != self.param.ds_tensor.data_ptr())

    def read(self, kind: str) -> Tensor:
        """Return the (S,) values of the float32 master (MASTER), or of a moment of the optimizer, by its name."""
        if kind == MASTER:
            return safe_get_local_fp32_param(self.param).flatten()[: self.count]
        return safe_get_local_optimizer_state(self.param, kind).flatten()[: self.count]

    def write(self, kind: str, values: Tensor) -> None:
        """Write (S,) values where `read` finds them; the working copy stays as it is."""
        size = -(-self.param.ds_numel // dist.get_world_size())
        padded = pad(values.float(), (0, size - self.count))
        if kind == MASTER:
            safe_set_local_fp32_param(self.param, padded)
        else:
            safe_set_local_optimizer_state(self.param, padded, kind)

    def gradient(self) -> Tensor:
        """Return the (S,) gradient, still multiplied by the loss scale."""
        return safe_get_local_grad(self.param).flatten()[: self.count]

    def working(self) -> Tensor:
        """Return the (S,) values that the forward pass uses."""
        if self.stays_gathered:
            return self.param.data.flatten()[self.start : self.start + self.count]
        return self.param.ds_tensor.flatten()[: self.count]

    def write_working(self, values: Tensor) -> None:
        """Write (S,) values that the forward pass is to use; the master stays as it is."""
        if self.stays_gathered:
            self.param.partition()  # the next forward pass gathers it again, from the new slices
        self.param.ds_tensor.flatten()[: self.count].copy_(values)

    def refresh(self) -> None:
        """Write the working copy anew from the master, as a step does."""
        self.write_working(self.read(MASTER))

    def zero_units(self, removed: Tensor, member: Member) -> None:
        """Zero the units that are True in an (N,) bool, in the working slice and in a copy that stays gathered."""
        shard = self.param.ds_tensor.flatten()[: self.count]
        kept = (~removed).to(shard)  # a product is ten times as fast as masked_fill on a CPU
        shard *= expand_to_shard(kept, self.start, self.count, member.unit_shape, member.unit_dim)
        if self.stays_gathered:
            by_unit = self.param.data.view(member.unit_shape)
            by_unit.index_fill_(member.unit_dim, removed.nonzero().flatten(), 0.0)
