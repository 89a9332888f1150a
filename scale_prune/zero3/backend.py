"""A DeepSpeed ZeRO-3 engine as pruning sees it: slices of parameters and gradients, masks on the working copy.

Facts relied on, each held by a test: a shard is a flat slice of ceil(numel / W) elements; the forward pass uses
`param.ds_tensor` (or, for small parameters that stay gathered, `param.data`), which every `step` writes anew from the
float32 master; gradients can be read between `backward` and `step` at the accumulation boundary.
"""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad
from torch import Tensor, nn

from scale_prune.core import Member, UnitGroup, expand_to_shard, shard_bounds
from scale_prune.criteria import ShardView


class Zero3Backend:
    """The shards of one engine on this rank; see `scale_prune.pruning.backend.ShardBackend`.

    Args:
        engine: a DeepSpeed engine with ZeRO stage 3 and an optimizer.

    Raises:
        ValueError: the engine's stage is not 3.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        if engine.zero_optimization_stage() != 3:
            raise ValueError(
                f"the engine runs ZeRO stage {engine.zero_optimization_stage()}; scale_prune needs stage 3"
            )
        self.engine = engine
        self.module: nn.Module = engine.module
        self.device = torch.device(engine.device)
        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()
        self.accumulation_steps: int = engine.gradient_accumulation_steps()
        self.parameters = dict(self.module.named_parameters())

    def check(self, groups: tuple[UnitGroup, ...]) -> None:
        """Refuse parameters that cannot be masked.

        Raises:
            ValueError: a member is frozen, or its master and working copy are one memory, so that a mask would destroy
                the weights for good.
        """
        for member in (member for group in groups for member in group.members):
            param: Any = self.parameters[member.name]
            if not param.requires_grad:
                raise ValueError(
                    f"parameter {member.name} is frozen; neurons can be pruned only where they are trained"
                )
            if safe_get_local_fp32_param(param).data_ptr() == param.ds_tensor.data_ptr():
                raise ValueError(
                    f"parameter {member.name} has no float32 master of its own in this ds_config, so masks would "
                    "destroy its weights; use bf16, fp16 or plain fp32"
                )

    @property
    def loss_scale(self) -> float:
        """What the loss of this step was multiplied by, in fp16; else 1."""
        return float(self.engine.optimizer.loss_scale)

    def at_boundary(self) -> bool:
        """Tell whether the coming step will be an optimizer step."""
        return bool(self.engine.is_gradient_accumulation_boundary())

    def steps_made(self) -> int:
        """Return how many optimizer steps the engine has made in its life, those that fp16 skipped included."""
        return int(self.engine.global_steps)

    def step_applied(self) -> bool:
        """Tell whether the last optimizer step changed the weights."""
        return bool(self.engine.was_step_applied())

    def gradients_finite(self) -> bool:
        """Tell whether this rank's slices of all gradients are finite, where `at_boundary`. No communication."""
        trained = (param for param in self.parameters.values() if param.requires_grad)
        sums = [self._local_grad(param).sum(dtype=torch.float64) for param in trained]
        return bool(torch.stack(sums).isfinite().all())

    def master(self, member: Member, *, grad: bool) -> ShardView:
        """Return this rank's slice of the float32 master, with the unscaled gradient if `grad`. No communication."""
        param: Any = self.parameters[member.name]
        start, count = self._bounds(param)
        gradient = None
        if grad:
            gradient = self._local_grad(param).float()
            gradient = gradient if self.loss_scale == 1.0 else gradient / self.loss_scale
        return ShardView(member, start, safe_get_local_fp32_param(param).flatten()[:count], gradient)

    def working(self, member: Member) -> ShardView:
        """Return this rank's slice of the working copy. No communication."""
        param: Any = self.parameters[member.name]
        start, count = self._bounds(param)
        if param.ds_status == ZeroParamStatus.AVAILABLE:
            values = param.data.flatten()[start : start + count]
        else:
            values = param.ds_tensor.flatten()[:count]
        return ShardView(member, start, values.to(self.device, torch.float32), None)

    @torch.no_grad()
    def mask_working_copy(self, group: UnitGroup, mask: Tensor) -> None:
        """Zero the removed units in this rank's slices, and in copies that stay gathered. No communication."""
        removed = ~mask
        for member in group.members:
            param: Any = self.parameters[member.name]
            start, count = self._bounds(param)
            shard = param.ds_tensor.flatten()[:count]
            shard.masked_fill_(expand_to_shard(removed.to(shard.device), start, count, member.shape, member.dim), 0.0)
            if param.ds_status == ZeroParamStatus.AVAILABLE:
                param.data.index_fill_(member.dim, removed.nonzero().flatten(), 0.0)

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """Add up (W * n,) over ranks and return this rank's n numbers."""
        own = values.new_empty(len(values) // self.world_size)
        dist.reduce_scatter_tensor(own, values)
        return own

    def all_gather(self, values: Tensor) -> Tensor:
        """Join the ranks' (n, ...) tensors along the first axis."""
        joined = values.new_empty(len(values) * self.world_size, *values.shape[1:])
        dist.all_gather_into_tensor(joined, values.contiguous())
        return joined

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor on the CPU) of everything a checkpoint holds, in the working precision.

        A collective: all ranks iterate to the end. One tensor at a time is gathered; what rank 0 gets is whole, what
        the other ranks get must not be used.
        """
        for name, param in self.parameters.items():
            with GatheredParameters([param]):
                full = param.detach().to("cpu", copy=True) if self.rank == 0 else torch.empty(0)
            yield name, full
        for name, tensor in self.module.state_dict().items():
            if name not in self.parameters and not hasattr(tensor, "ds_id") and tensor.numel():
                yield name, tensor.detach().to("cpu", copy=True)

    def let_go(self) -> None:
        """Drop the engine and its parameters, which would stay in memory with this object; collectives still work."""
        del self.engine
        self.parameters.clear()

    def _local_grad(self, param: Any) -> Tensor:
        """Return this rank's slice of a gradient, still scaled, without the padding, which may hold anything."""
        return safe_get_local_grad(param).flatten()[: self._bounds(param)[1]]

    def _bounds(self, param: Any) -> tuple[int, int]:
        return shard_bounds(param.ds_numel, self.rank, self.world_size)


def num_parameters(module: nn.Module) -> int:
    """Return the number of elements of a sharded module's parameters, tied ones once."""
    sharded: Any = module.parameters()
    return sum(param.ds_numel for param in sharded)
