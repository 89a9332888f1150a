"""Compaction under ZeRO-3: from a masked engine to a smaller model under a new engine, over the same ranks.

One tensor at a time is gathered, cut down and sharded again. Masters and optimizer state keep full precision: each rank
holds its new slices of them in memory between the two engines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from scale_prune.core import Member, UnitGroup, select_units, set_members, shard_bounds
from scale_prune.zero3.backend import Zero3Backend
from scale_prune.zero3.engine_state import facts_of, kinds_of, restore, trained
from scale_prune.zero3.runtime import inference_engine
from scale_prune.zero3.shard import MASTER, Shard

GRADIENTS = "gradients"
"""The kind of an engine's averaged gradients, which are freed and never carried over."""
Slices = dict[tuple[str, str], Tensor]
"""This rank's slices by (kind, parameter name)."""


def compact_engine(
    backend: Zero3Backend,
    groups: tuple[UnitGroup, ...],
    masks: Mapping[str, Tensor],
    make_engine: Callable[[nn.Module], deepspeed.DeepSpeedEngine] | None,
    take_gates_off: Callable[[], Mapping[str, Tensor]],
    *,
    anew: bool = False,
) -> tuple[deepspeed.DeepSpeedEngine, tuple[UnitGroup, ...]]:
    """Remove the masked units for good. A collective; it can be called again on what it returns.

    Args:
        backend: the engine to take apart; it is destroyed.
        groups: the groups of its model.
        masks: (N,) bool by group name, True = keep.
        make_engine: builds an engine of the same settings around the module; None for one that only reads.
        take_gates_off: returns (N,) by group name, numbers that the weights which read the units take on for good.
        anew: the new engine takes over the weights alone.

    Returns:
        The new engine, to which masters, moments, rates, schedulers and loss scale have moved, and the smaller groups.

    Raises:
        ValueError: the optimizer's state cannot be carried over; everything is as it was.
    """
    backend.finish_prefetches()
    facts = facts_of(backend) if make_engine and backend.trains and not anew else None
    reduced = _reductions(groups, masks, take_gates_off())
    slices = _reduced_slices(backend, kinds_of(facts), reduced) if facts else {}
    smaller = _smaller_parameters(backend, reduced)  # before `initialize`: the order that DeepSpeed 0.19 needs
    ds_config = backend.engine._config._param_dict  # `engine.config` may be the path of a file
    before = _working_copy(backend)
    take_apart(backend)
    compacted = tuple(_narrowed(backend, group, smaller, int(masks[group.name].sum())) for group in groups)
    engine = make_engine(backend.module) if make_engine else inference_engine(backend.module, ds_config)
    _free(before, unless_used_by=backend.module)
    backend.let_go()
    if facts:
        restore(Zero3Backend(engine), facts, lambda kind, name, start, count: slices[kind, name])
    return engine, compacted


@dataclass(frozen=True)
class _Reduction:
    """What becomes of a member: which units stay, and what their elements are multiplied by."""

    member: Member
    keep: Tensor
    factors: Tensor | None

    def of(self, tensor: Tensor, *, is_weight: bool) -> Tensor:
        """Return the smaller tensor; moments are only cut."""
        small = select_units(tensor, self.keep, self.member)
        if self.factors is None or not is_weight:
            return small
        along = [1] * small.dim()
        along[self.member.dim] = -1
        factors = self.factors.to(small.device)[self.keep.to(small.device)].repeat_interleave(self.member.block)
        return (small.float() * factors.view(along)).to(small.dtype)


def _reductions(
    groups: Sequence[UnitGroup], masks: Mapping[str, Tensor], gates: Mapping[str, Tensor]
) -> dict[str, _Reduction]:
    """Return what becomes of every member, by its name."""
    reduced = {}
    for group in groups:
        keep = masks[group.name].nonzero().flatten()
        for member in group.members:
            factors = gates.get(group.name) if member.role == "out" else None
            reduced[member.name] = _Reduction(member, keep, factors)
    return reduced


def _reduced_slices(backend: Zero3Backend, kinds: Sequence[str], reduced: Mapping[str, _Reduction]) -> Slices:
    """Move this rank's slices of masters and moments to the CPU, cut down to the units that stay, a kind at a time.

    So there is never more than while training.
    """
    slices = {}
    _free_state(backend.engine.optimizer, [GRADIENTS])
    for kind in kinds:
        for name in trained(backend):
            cut = name in reduced
            own = _cut_slice(backend, name, kind, reduced[name]) if cut else Shard(backend.parameters[name]).read(kind)
            slices[kind, name] = own.to("cpu", copy=True)
        _free_state(backend.engine.optimizer, [kind])
    return slices


def _cut_slice(backend: Zero3Backend, name: str, kind: str, reduction: _Reduction) -> Tensor:
    param = backend.parameters[name]
    full = safe_get_full_fp32_param(param) if kind == MASTER else safe_get_full_optimizer_state(param, kind)
    small = reduction.of(full, is_weight=kind == MASTER).flatten()
    start, count = shard_bounds(small.numel(), backend.rank, backend.world_size)
    return small[start : start + count]


def _smaller_parameters(backend: Zero3Backend, reduced: Mapping[str, _Reduction]) -> dict[str, nn.Parameter]:
    """Build the smaller parameters, each partitioned before the next one is gathered."""
    smaller = {}
    for name, reduction in reduced.items():
        param: Any = backend.parameters[name]
        with deepspeed.zero.GatheredParameters([param]):
            small = nn.Parameter(reduction.of(param.detach(), is_weight=True).clone())
        param.convert_to_zero_parameters(param_list=[small])
        smaller[name] = small
    return smaller


def _narrowed(backend: Zero3Backend, group: UnitGroup, smaller: dict[str, nn.Parameter], num_units: int) -> UnitGroup:
    """Put a group's smaller parameters into the model, out of `smaller`; return the group as it is then."""
    own = {member.name: smaller.pop(member.name) for member in group.members}
    return set_members(backend.module, group, own, num_units)


def take_apart(backend: Zero3Backend) -> None:
    """Destroy the engine and leave its model for another one, without what would be in that one's way."""
    engine = backend.engine
    if backend.trains:
        _free_state(engine.optimizer)
        engine.optimizer.optimizer.state.clear()  # what could not be resized
    engine.destroy()
    left_behind = engine.module_forward_pre_hook, engine.module_forward_post_hook
    for hook in filter(None, left_behind):
        hook.remove()
    _forget_engine(backend.module)


@contextmanager
def reading(model: nn.Module, ds_config: dict[str, Any]) -> Iterator[Zero3Backend]:
    """Put an engine around a model that only reads, and take it off again. A collective."""
    backend = Zero3Backend(inference_engine(model, ds_config))
    yield backend
    take_apart(backend)
    backend.let_go()


def release(engine: Any) -> None:
    """Take an engine apart for good, and free the memory of its shards, masters, moments and gradients."""
    backend = Zero3Backend(engine)
    before = _working_copy(backend)
    take_apart(backend)
    sharded: Any = backend.module.parameters()
    for param in sharded:
        param.ds_tensor.data = param.ds_tensor.new_empty(0)
        param.data = param.data.new_empty(0)
    _free(before, unless_used_by=backend.module)


def _free_state(sharded_optimizer: Any, kinds: Sequence[str] | None = None) -> None:
    """Give back masters, moments and gradients, which `destroy` leaves in memory while anything holds the engine."""
    working = {flat.data_ptr() for flat in sharded_optimizer.fp16_partitioned_groups_flat if flat is not None}
    states = [(MASTER, flat) for flat in sharded_optimizer.fp32_partitioned_groups_flat]
    states += [item for state in sharded_optimizer.optimizer.state.values() for item in state.items()]
    gradients = [
        getattr(flat, "grad", None) for flat in sharded_optimizer.fp32_partitioned_groups_flat
    ]  # there where it is offloaded
    states += [(GRADIENTS, held) for held in (*gradients, sharded_optimizer.grad_partitions_flat_buffer)]
    for kind, held in states:
        wanted = torch.is_tensor(held) and (kinds is None or kind in kinds)
        if wanted and held.data_ptr() not in working:
            _give_back(held)


def _working_copy(backend: Zero3Backend) -> list[Tensor]:
    """Return what an engine that trains keeps its working copy in."""
    flats = backend.engine.optimizer.fp16_partitioned_groups_flat if backend.trains else []
    return [flat for flat in flats if flat is not None]


def _free(flats: Sequence[Tensor], unless_used_by: nn.Module) -> None:
    """Give back an old working copy, which caches of DeepSpeed's classes hold, where a new engine has made its own."""
    sharded: Any = unless_used_by.parameters()
    used = {param.ds_tensor.untyped_storage().data_ptr() for param in sharded}
    for flat in flats:
        if flat.untyped_storage().data_ptr() not in used:
            _give_back(flat)


def _give_back(held: Tensor) -> None:
    """Free a tensor's memory, whoever holds the tensor."""
    # What torch.load has put on the CPU cannot be resized: moments out of a checkpoint of the engine.
    if held.untyped_storage().resizable():
        held.untyped_storage().resize_(0)


def _forget_engine(module: nn.Module) -> None:
    """Drop what `destroy` leaves behind: autograd functions bound to the old engine, which a new one would call again.

    Without this the new engine trains one step and then stops with "tracing error" (DeepSpeed 0.19).
    """
    for submodule in module.modules():
        for leftover in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
            submodule.__dict__.pop(leftover, None)
