"""What an engine remembers between steps, apart from the weights' working copy, and how another engine takes it over.

Tensors are taken out as this rank's flat slices, everything else as values, which `plain` turns into those of JSON. The
other engine may have smaller parameters (compaction) or another number of ranks (a resumed run): who calls cuts the
slices anew.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from scale_prune.core import FlatSlice
from scale_prune.zero3.backend import Zero3Backend
from scale_prune.zero3.shard import MASTER, Shard, settle

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# What changes while an engine trains; everything else about them is a setting, which the new engine has itself.
OPTIONS = ("lr", "betas")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def facts_of(backend: Zero3Backend) -> dict[str, Any]:
    """Return what is the same on all ranks: step counts, rates, scheduler, loss scale, names of the moments.

    Raises:
        ValueError: the optimizer keeps moments of another form than the weights'.
    """
    if not backend.trains:
        nothing: dict[str, Any] = {"moments": [], "scalars": {}, "options": [], "scheduler": {}, "loss_scaler": {}}
        return {"counters": dict.fromkeys(COUNTERS, 0)} | nothing
    engine, optimizer = backend.engine, backend.engine.optimizer.optimizer
    moments, scheduler = _moments(optimizer), engine.lr_scheduler
    state: dict[str, Any] = next(iter(optimizer.state.values()), {})
    return {
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "moments": moments,
        "scalars": {key: plain(value) for key, value in state.items() if key not in moments},
        "options": [_only(OPTIONS, group) for group in _groups(backend)],
        "scheduler": None if scheduler is None else deepcopy(scheduler.state_dict()),
        "loss_scaler": _only(SCALER, vars(engine.optimizer.loss_scaler)),
    }


def _moments(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the tensors that an optimizer keeps, each of its weights' form.

    Raises:
        ValueError: one is of another form, as in 8 bits, or is kept of some weights alone, as by Muon.
    """
    kept = [
        (flat.numel(), {key: each for key, each in state.items() if torch.is_tensor(each) and each.dim()})
        for flat, state in optimizer.state.items()
    ]
    names = list(dict.fromkeys(name for _, held in kept for name in held))
    for count, held in kept:
        for name in names:
            moment = held.get(name, torch.empty(0))
            if moment.numel() != count or not moment.is_floating_point():
                found = f"{moment.numel()} {str(moment.dtype).removeprefix('torch.')}"
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {name}, {found} for {count} weights, which cannot be cut with "
                    "them, as one floating point number a weight can; compact without make_engine leaves moments behind"
                )
    return names


def kinds_of(facts: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors that an engine keeps for every parameter, the master first."""
    return [MASTER, *facts["moments"]]


def engine_slices(backend: Zero3Backend) -> Iterator[tuple[str, FlatSlice]]:
    """Yield this rank's slices of all masters and moments as ("master/NAME", slice), copied to the CPU one by one."""
    kinds = kinds_of(facts_of(backend))
    for name in trained(backend):
        shard = Shard(backend.parameters[name])
        for kind in kinds:
            yield f"{kind}/{name}", FlatSlice(shard.start, shard.read(kind).to("cpu", copy=True))


def restore(backend: Zero3Backend, facts: Mapping[str, Any], read: Callable[[str, str, int, int], Tensor]) -> None:
    """Give an engine that has not made a step what another one remembered; its working copy stays as it is.

    Args:
        backend: the engine, with the optimizer and scheduler of the other one.
        facts: of `facts_of`, perhaps out of a file that anybody has written; names that it should not have are ignored.
        read: (kind, name, start, count) -> the (count,) values.

    Raises:
        ValueError: optimizer or scheduler are of another kind.
    """
    if not backend.trains:  # what it knows is the pruner's
        return
    engine, found, before = backend.engine, len(_groups(backend)), len(facts["options"])
    if found != before or (facts["scheduler"] is not None and engine.lr_scheduler is None):
        schedulers = ["a" if each is not None else "no" for each in (engine.lr_scheduler, facts["scheduler"])]
        raise ValueError(
            f"the new engine has {found} groups of parameters and {schedulers[0]} scheduler, the one before had "
            f"{before} and {schedulers[1]}: let make_engine build the same anew, around the parameters as they are then"
        )
    _make_state(backend, facts)
    for name in trained(backend):
        shard = Shard(backend.parameters[name])
        for kind in kinds_of(facts):
            shard.write(kind, read(kind, name, shard.start, shard.count))
    if facts["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(_only(engine.lr_scheduler.state_dict(), facts["scheduler"]))
    # A scheduler writes the rate after a step, for the next one; its state alone does not bring it back.
    for group, options in zip(_groups(backend), facts["options"], strict=True):
        group.update(_only(OPTIONS, options))
    scaler = engine.optimizer.loss_scaler
    vars(scaler).update(_only(set(SCALER) & vars(scaler).keys(), facts["loss_scaler"]))
    for name in COUNTERS:
        setattr(engine, name, facts["counters"][name])


@torch.no_grad()
def write_working_copy(backend: Zero3Backend) -> None:
    """Write this rank's working slices anew from the masters, as a step does. No communication."""
    for name in trained(backend):
        Shard(backend.parameters[name]).refresh()
    settle()


def trained(backend: Zero3Backend) -> list[str]:
    """Return the names of the parameters that are trained."""
    return [name for name, param in backend.parameters.items() if param.requires_grad]


def _groups(backend: Zero3Backend) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = backend.engine.optimizer.optimizer.param_groups
    return groups


def _make_state(backend: Zero3Backend, facts: Mapping[str, Any]) -> None:
    """Make the state that an optimizer would make lazily at its first step, so that it can be written to."""
    if not facts["moments"]:
        return
    sharded = backend.engine.optimizer
    groups = (sharded.optimizer.param_groups[group] for group in sharded.sub_group_to_group_id.values())
    for flat, group in zip(sharded.fp32_partitioned_groups_flat, groups, strict=True):
        device = flat.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        scalars = {key: _optimizers_own(value, device) for key, value in facts["scalars"].items()}
        sharded.optimizer.state[flat] = scalars | {kind: torch.zeros_like(flat) for kind in facts["moments"]}


def plain(value: Any) -> Any:
    """Return a value, or those in lists and dicts, as JSON holds it; a tensor's number becomes {"tensor": number}.

    Raises:
        ValueError: there is none.
    """
    if torch.is_tensor(value) and value.dim() == 0:
        return {"tensor": value.item()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, int | float | str | None):
        return value
    raise ValueError(f"the optimizer or scheduler keeps a {type(value).__name__}, which a checkpoint cannot hold")


def _optimizers_own(value: Any, device: torch.device) -> Any:
    return torch.tensor(value["tensor"], dtype=torch.float32, device=device) if isinstance(value, dict) else value


def _only(allowed: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in allowed if name in values}
