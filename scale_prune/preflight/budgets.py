"""What a user can afford, in other words than `--remaining`: parameters, operations, time; tables of earlier runs."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from scale_prune.config import EMBEDDING, PruningConfig
from scale_prune.core import UnitGroup
from scale_prune.core.level_table import LevelTable


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Return the parameters of a model, tied ones once, and the operations of its matrices for a token."""
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    return {
        "max_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "max_flops": 2 * sum(module.weight.numel() for module in matrices),
    }


def afforded(
    pruning: PruningConfig, explicit: frozenset[str], sizes: dict[str, int], groups: Sequence[UnitGroup]
) -> PruningConfig:
    """Return settings whose `remaining` is what the user can afford, if this is said in other words, which go.

    Args:
        pruning: the settings.
        explicit: names of the settings that the user gave.
        sizes: of the dense model, from `sizes_of`.
        groups: what can be removed.

    Raises:
        ValueError: it is said twice; or nothing has to be removed, or more than everything.
    """
    words = {name: each for name in (*sizes, "latency_target") if (each := getattr(pruning, name)) is not None}
    if not words:
        return pruning
    same_run = pruning.remaining == pruning.latency_target  # its own settings, read again
    given = [*words, *(["remaining"] if "remaining" in explicit and not same_run else [])]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in given)} say the same in other words; give one of them")
    if pruning.latency_target is not None:
        # What remains is known when levels have been measured; the way there goes by this fraction.
        return replace(pruning, remaining=pruning.latency_target)
    (name, limit), whole = next(iter(words.items())), sizes[next(iter(words))]
    if name == "max_flops" and EMBEDDING in pruning.target_names:
        raise ValueError(f"--max_flops counts matrices, --targets {pruning.targets} tables as well; give --remaining")
    removable = sum(_removable(group, only_matrices=name == "max_flops") for group in groups)
    removable *= 2 if name == "max_flops" else 1
    if not whole - removable < limit < whole:
        raise ValueError(
            f"--{name} {limit:,} cannot be reached: the model has {whole:,}, of which --targets {pruning.targets} are "
            f"{removable:,}; give more than {whole - removable:,} and fewer than {whole:,}"
        )
    # Without the words, so that the settings of a run start the same run again.
    return replace(pruning, remaining=(limit - (whole - removable)) / removable, max_parameters=None, max_flops=None)


def _removable(group: UnitGroup, *, only_matrices: bool) -> int:
    """Return the elements of the dense model that go with a group."""
    if group.kind == "component":
        return group.dense_cost
    return sum(math.prod(member.shape) for member in group.members if len(member.shape) > 1 or not only_matrices)


def read_table(path: str, groups: Sequence[UnitGroup]) -> LevelTable:
    """Read a table of levels that an earlier run has measured.

    Args:
        path: table.json in the folder of a run with `--budget measured`.
        groups: the model's groups.

    Raises:
        ValueError: it cannot be read, or is of other groups.
    """
    try:
        table = LevelTable.from_told(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        raise ValueError(f"--table {path} cannot be read: {problem}") from problem
    here = {group.name: group.num_units for group in groups}
    there = {name: kept[-1] for name, kept in zip(table.names, table.kept, strict=True)}
    if here != there:
        name = min(name for name, _ in set(here.items()) ^ set(there.items()))
        raise ValueError(
            f"--table {path} is of another model or other --targets: {len(there)} groups, the model has {len(here)}, "
            f"and of {name} {there.get(name, 0)} units, the model has {here.get(name, 0)}; measure anew without --table"
        )
    return table
