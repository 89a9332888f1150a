"""Compaction under ZeRO-3: from a masked engine to a smaller model under a new engine, over the same ranks.

One tensor at a time is gathered, cut down and sharded again. Masters and optimizer state keep full precision: each rank
holds its new slices of them in memory between the two engines.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from scale_prune.core.compaction import select_units, set_members
from scale_prune.core.groups import Member, UnitGroup
from scale_prune.core.shards import shard_bounds
from scale_prune.zero3.backend import Zero3Backend

MASTER = "master"


@dataclass
class Carried:
    """What survives an engine: this rank's slices by parameter name and kind, scalars of optimizer and scheduler."""

    slices: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    loss_scaler: Any = None
    scheduler: dict[str, Any] | None = None


def compact_engine(
    backend: Zero3Backend,
    groups: tuple[UnitGroup, ...],
    masks: Mapping[str, Tensor],
    make_engine: Callable[[nn.Module], deepspeed.DeepSpeedEngine],
) -> tuple[deepspeed.DeepSpeedEngine, tuple[UnitGroup, ...]]:
    """Remove the masked units for good. A collective; it can be called again on what it returns.

    Args:
        backend: the engine to take apart; it is destroyed.
        groups: the groups of its model.
        masks: (N,) bool by group name, True = keep.
        make_engine: builds an engine of the same settings around the module.

    Returns:
        The new engine and the groups with their new widths. Masters, optimizer state, learning rates, schedulers and
        the loss scale are carried over.

    Source: the order of calls that DeepSpeed 0.19 needs: partition the smaller parameters before `initialize`.
    """
    keep = {group.name: masks[group.name].nonzero().flatten() for group in groups}
    reduced = {member.name: (member, keep[group.name]) for group in groups for member in group.members}
    carried = _carry_out(backend, reduced)
    smaller = _smaller_parameters(backend, reduced)
    backend.engine.destroy()
    _forget_engine(backend.module)
    compacted = []
    for group in groups:
        own = {member.name: smaller.pop(member.name) for member in group.members}
        compacted.append(set_members(backend.module, group, own, len(keep[group.name])))
    engine = make_engine(backend.module)
    _carry_in(Zero3Backend(engine), carried)
    return engine, tuple(compacted)


def _carry_out(backend: Zero3Backend, reduced: Mapping[str, tuple[Member, Tensor]]) -> Carried:
    """Copy this rank's slices of masters and optimizer state, cut down to the units that stay."""
    optimizer = backend.engine.optimizer.optimizer
    state: dict[str, Any] = next(iter(optimizer.state.values()), {})
    kinds = [MASTER, *(key for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0)]
    carried = Carried(scalars={key: value for key, value in state.items() if key not in kinds})
    carried.rates = [options["lr"] for options in optimizer.param_groups]
    carried.loss_scaler = backend.engine.optimizer.loss_scaler
    if backend.engine.lr_scheduler is not None:
        carried.scheduler = backend.engine.lr_scheduler.state_dict()
    for name, param in backend.parameters.items():
        if param.requires_grad:
            carried.slices[name] = {kind: _slice(backend, name, kind, reduced) for kind in kinds}
    return carried


def _slice(backend: Zero3Backend, name: str, kind: str, reduced: Mapping[str, tuple[Member, Tensor]]) -> Tensor:
    param = backend.parameters[name]
    if name not in reduced:
        local = safe_get_local_fp32_param(param) if kind == MASTER else safe_get_local_optimizer_state(param, kind)
        return local.to("cpu", copy=True)
    full = safe_get_full_fp32_param(param) if kind == MASTER else safe_get_full_optimizer_state(param, kind)
    member, keep = reduced[name]
    small = select_units(full, keep, member.dim).flatten()
    start, count = shard_bounds(small.numel(), backend.rank, backend.world_size)
    local = small.new_zeros(-(-small.numel() // backend.world_size))
    local[:count] = small[start : start + count]
    return local.cpu()


def _smaller_parameters(backend: Zero3Backend, reduced: Mapping[str, tuple[Member, Tensor]]) -> dict[str, nn.Parameter]:
    """Build the smaller parameters, each partitioned before the next one is gathered."""
    smaller = {}
    for name, (member, keep) in reduced.items():
        param: Any = backend.parameters[name]
        with deepspeed.zero.GatheredParameters([param]):
            small = nn.Parameter(select_units(param.detach(), keep, member.dim).clone())
        param.convert_to_zero_parameters(param_list=[small])
        smaller[name] = small
    return smaller


def _forget_engine(module: nn.Module) -> None:
    """Drop what `destroy` leaves behind: autograd functions bound to the old engine, which a new one would call again.

    Without this the new engine trains one step and then stops with "tracing error" (DeepSpeed 0.19).
    """
    for submodule in module.modules():
        for leftover in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
            submodule.__dict__.pop(leftover, None)


def _carry_in(backend: Zero3Backend, carried: Carried) -> None:
    """Write masters, optimizer state and scheduler into a fresh engine."""
    state_kinds = {kind for slices in carried.slices.values() for kind in slices} - {MASTER}
    if state_kinds:
        _initialise_state(backend.engine.optimizer, state_kinds, carried.scalars)
    for name, slices in carried.slices.items():
        param: Any = backend.parameters[name]
        for kind, local in slices.items():
            if kind == MASTER:
                safe_set_local_fp32_param(param, local)
            else:
                safe_set_local_optimizer_state(param, local, kind)
    if carried.scheduler is not None:
        backend.engine.lr_scheduler.load_state_dict(carried.scheduler)
    # A scheduler writes the rate after a step, for the next one; its state alone does not bring it back.
    for options, rate in zip(backend.engine.optimizer.optimizer.param_groups, carried.rates, strict=True):
        options["lr"] = rate
    backend.engine.optimizer.loss_scaler = carried.loss_scaler


def _initialise_state(sharded_optimizer: Any, kinds: set[str], scalars: Mapping[str, Any]) -> None:
    """Make the state that an optimizer would make lazily at its first step, so that it can be written to."""
    for flat in sharded_optimizer.fp32_partitioned_groups_flat:
        copies = {key: value.clone() if torch.is_tensor(value) else value for key, value in scalars.items()}
        sharded_optimizer.optimizer.state[flat] = copies | {kind: torch.zeros_like(flat) for kind in kinds}
