"""A DeepSpeed ZeRO-3 engine as pruning sees it: slices of parameters and gradients, masks on the working copy."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from scale_prune.core import Member, UnitGroup
from scale_prune.criteria import ShardView
from scale_prune.zero3.shard import MASTER, Shard, settle


class Collectives:
    """What moves between the ranks, beside parameters.

    Attributes:
        rank: this one.
        world_size: how many there are, W.
        received: bytes that this rank did not have and was handed, by collective.
    """

    def __init__(self) -> None:
        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()
        self.received: Counter[str] = Counter()

    def reduce(self, values: Tensor, rank: int) -> Tensor:
        """Add up a tensor over ranks, in place; the sum is that of `rank`, the others' must not be used."""
        dist.reduce(values, rank)
        self.received["reduce"] += values.nbytes * (self.rank == rank) * (self.world_size > 1)
        return values

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """Add up (W * n,) over ranks and return this rank's n numbers."""
        own = values.new_empty(len(values) // self.world_size)
        dist.reduce_scatter_tensor(own, values)
        self.received["reduce_scatter"] += values.nbytes - own.nbytes
        return own

    def gather_on(self, values: Tensor, rank: int) -> Tensor:
        """Join the ranks' (n, ...) tensors along the first axis on one rank; the others get none."""
        parts = [torch.empty_like(values) for _ in range(self.world_size)] if self.rank == rank else None
        dist.gather(values.contiguous(), parts, rank)
        self.received["gather"] += values.nbytes * (self.world_size - 1) * (self.rank == rank)
        return torch.cat(parts) if parts else values.new_empty(0, *values.shape[1:])

    def all_gather(self, values: Tensor) -> Tensor:
        """Join the ranks' (n, ...) tensors along the first axis."""
        joined = values.new_empty(len(values) * self.world_size, *values.shape[1:])
        dist.all_gather_into_tensor(joined, values.contiguous())
        self.received["all_gather"] += joined.nbytes - values.nbytes
        return joined


class Zero3Backend(Collectives):
    """The shards of one engine on this rank; see `scale_prune.pruning.backend.ShardBackend`.

    Args:
        engine: a DeepSpeed engine with ZeRO stage 3, or a `FrozenEngine`; without an optimizer the working copy is the
            master as well.

    Attributes:
        trains: whether the engine has an optimizer.

    Raises:
        ValueError: the engine's stage is not 3, or its parameters are not sharded over all ranks.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        if engine.zero_optimization_stage() != 3:
            raise ValueError(
                f"the engine runs ZeRO stage {engine.zero_optimization_stage()}; scale_prune needs stage 3"
            )
        if getattr(engine, "mpu", None) is not None:
            raise ValueError(
                "the engine was given an `mpu`, by which ranks share sequences or tensors; scale_prune needs shards "
                "over all ranks, and every rank to read rows of its own"
            )
        super().__init__()
        self.engine = engine
        self.trains = hasattr(engine.optimizer, "fp32_partitioned_groups_flat")
        self.module: nn.Module = engine.module
        self.device = torch.device(engine.device)
        self.accumulation_steps: int = engine.gradient_accumulation_steps()
        self.parameters = dict(self.module.named_parameters())

    @property
    def loss_scale(self) -> float:
        """What the loss of this step was multiplied by, in fp16; else 1."""
        return float(self.engine.optimizer.loss_scale if self.trains else getattr(self.engine, "loss_scaled_by", 1.0))

    def at_boundary(self) -> bool:
        """Tell whether the coming step will be an optimizer step."""
        return bool(self.engine.is_gradient_accumulation_boundary())

    def steps_made(self) -> int:
        """Return how many optimizer steps the engine has made in its life, those that fp16 skipped included."""
        return int(self.engine.global_steps)

    def step_applied(self) -> bool:
        """Tell whether the last optimizer step changed the weights."""
        return bool(self.engine.was_step_applied())

    def master(self, member: Member, *, grad: bool) -> ShardView:
        """Return this rank's slice of the float32 master, with the unscaled gradient if `grad`. No communication."""
        shard, gradient = Shard(self.parameters[member.name]), None
        if grad:
            gradient = shard.gradient().float() if self.trains else self.engine.gradients[member.name]
            gradient = gradient if self.loss_scale == 1.0 else gradient / self.loss_scale
        weight = shard.read(MASTER) if self.trains else self.working(member).weight
        return ShardView(member, shard.start, weight, gradient)

    def working(self, member: Member) -> ShardView:
        """Return this rank's slice of the working copy. No communication."""
        shard = Shard(self.parameters[member.name])
        return ShardView(member, shard.start, shard.working().to(self.device, torch.float32), None)

    @torch.no_grad()
    def mask_working_copy(self, group: UnitGroup, mask: Tensor, *, anew: bool = False) -> None:
        """Zero the removed units in this rank's slices, and in copies that stay gathered. No communication."""
        removed = ~mask
        for member in group.members:
            shard = Shard(self.parameters[member.name])
            if anew and self.trains:
                shard.refresh()
            shard.zero_units(removed, member)
        settle()

    def gather(self, name: str) -> Tensor:
        """Return a parameter's whole working copy in float32. A collective; a rank receives it once."""
        param: Any = self.parameters[name]
        with GatheredParameters([param]):
            return param.detach().float().clone()

    def finish_prefetches(self) -> None:
        """Let go of parameters that the last forward pass has begun to gather for a backward pass that never came.

        DeepSpeed neither gathers these nor lets go of them otherwise. A collective.
        """
        self.engine.empty_partition_cache()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor on the CPU) of everything a checkpoint holds, in the working precision.

        A collective: all ranks iterate to the end. One tensor at a time is gathered, and every rank gets it.
        """
        self.finish_prefetches()
        for name, param in self.parameters.items():
            with GatheredParameters([param]):
                full = param.detach().to("cpu", copy=True)
            yield name, full
        for name, tensor in self.module.state_dict().items():
            if name not in self.parameters and not hasattr(tensor, "ds_id") and tensor.numel():
                yield name, tensor.detach().to("cpu", copy=True)

    def let_go(self) -> None:
        """Drop the engine and its parameters, which would stay in memory with this object; collectives still work."""
        del self.engine
        self.parameters.clear()


def num_parameters(module: nn.Module) -> int:
    """Return the number of elements of a sharded module's parameters, tied ones once."""
    sharded: Any = module.parameters()
    return sum(param.ds_numel for param in sharded)


def gradients_finite(module: nn.Module) -> bool:
    """Tell whether this rank's slices of all gradients are finite, at the accumulation boundary. No communication."""
    # One at a time: each is a copy in float32, on the GPU where the optimizer is offloaded.
    trained = [Shard(param) for param in module.parameters() if param.requires_grad]
    if torch.stack([shard.gradient().sum(dtype=torch.float32) for shard in trained]).isfinite().all():
        return True  # 30 times as fast as to look at each; but a sum may overflow
    return all(bool(shard.gradient().isfinite().all()) for shard in trained)


def check_maskable(module: nn.Module, groups: Sequence[UnitGroup]) -> None:
    """Refuse parameters of an engine's module that cannot be masked.

    Raises:
        ValueError: a member is frozen, or its master and working copy are one memory, so that a mask would destroy the
            weights for good.
    """
    for member in (member for group in groups for member in group.members):
        param: Any = module.get_parameter(member.name)
        if not param.requires_grad:
            raise ValueError(f"parameter {member.name} is frozen; neurons can be pruned only where they are trained")
        if not Shard(param).has_own_master:
            raise ValueError(
                f"parameter {member.name} has no float32 master of its own in this ds_config, so masks would "
                "destroy its weights; use bf16, fp16 or plain fp32"
            )
