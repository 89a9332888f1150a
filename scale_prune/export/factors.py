"""Factorized weights in a form that the exported model has: as factors where that is smaller, else multiplied out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_prune.core import UnitGroup, saves
from scale_prune.models import FACTOR_WORDS
from scale_prune.models.embedding import CLUSTERS


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of the factorized weights.

    Attributes:
        ranks: of the linear modules that stay factorized, by name.
        table: the name of the clustered embedding, "" where there is none.
        output: the name of the output that is tied to it, "" where there is none.
        sizes: tokens of each cluster.
        cluster_ranks: components of each cluster where the embedding stays factorized, else empty.
    """

    ranks: dict[str, int]
    table: str
    output: str
    sizes: list[int]
    cluster_ranks: list[int]

    def settings(self) -> dict[str, Any]:
        """Return what config.json says of it; empty where everything is multiplied out."""
        settings: dict[str, Any] = {FACTOR_WORDS[0]: self.ranks} if self.ranks else {}
        if self.cluster_ranks:
            names = [self.table, self.output] if self.output else [self.table]
            settings[FACTOR_WORDS[1]] = {"names": names, "sizes": self.sizes, "ranks": self.cluster_ranks}
        return settings


def plan_for(layout: str, groups: Sequence[UnitGroup], output: str) -> Plan:
    """Choose what stays factorized.

    Args:
        layout: "per_layer" keeps factors where they are smaller than the matrix; the others have no place for them.
        groups: the compacted groups of components.
        output: the name of the output that is tied to the embedding, "" where there is none.
    """
    clusters = [group for group in groups if CLUSTERS in group.name]
    linear = [group for group in groups if CLUSTERS not in group.name]
    kept = layout == "per_layer"
    smaller = sum(group.num_units * group.cost for group in clusters) < sum(group.dense_cost for group in clusters)
    return Plan(
        ranks={group.name: group.num_units for group in linear if kept and saves(group.num_units, _shape(group))},
        table=clusters[0].name.partition(CLUSTERS)[0] if clusters else "",
        output=output if clusters else "",
        sizes=[_shape(group)[0] for group in clusters],
        cluster_ranks=[group.num_units for group in clusters] if kept and smaller else [],
    )


def multiplies_out(layout: str, groups: Sequence[UnitGroup]) -> bool:
    """Tell whether some factors become one matrix, of compacted groups of components as `plan_for` has them."""
    plan = plan_for(layout, groups, "")
    return len(plan.ranks) + len(plan.cluster_ranks) < len(groups)


def stored_factors(
    tensors: Iterable[tuple[str, Tensor]], groups: Sequence[UnitGroup], plan: Plan, *, transposed: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield private CPU copies under the names that the exported model has.

    Args:
        tensors: names and tensors of the compacted model, each tensor copied before the next is asked for.
        groups: the compacted groups of components.
        plan: what becomes of them.
        transposed: linear weights that are multiplied out are stored (in, out).
    """
    linear = {group.name for group in groups if CLUSTERS not in group.name}
    waiting: dict[str, Tensor] = {}
    table: dict[str, Tensor] = {}
    for name, tensor in tensors:
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        module, _, part = name.rpartition(".")
        if plan.table and not plan.cluster_ranks and f"{name}.".startswith(f"{plan.table}."):
            table[name.removeprefix(f"{plan.table}.")] = copied
        elif module not in linear:
            yield name, copied
        elif module in plan.ranks:
            yield (f"{module}.up.bias" if part == "bias" else f"{name}.weight"), copied
        elif part == "bias":
            yield name, copied
        elif module not in waiting:
            waiting[module] = copied
        else:
            whole = product(waiting.pop(module), copied)
            yield f"{module}.weight", whole.T.contiguous() if transposed else whole
    if table:
        yield f"{plan.table}.weight", whole_table(table, len(plan.sizes))
    assert not waiting, f"factors of {sorted(waiting)} are missing"


def whole_table(parts: dict[str, Tensor], num_clusters: int) -> Tensor:
    """Return the (V, D) embedding, its rows in the order of token ids."""
    rows = [product(parts[f"clusters.{i}.down"], parts[f"clusters.{i}.up"]) for i in range(num_clusters)]
    return torch.cat(rows)[parts["place"]]


def product(down: Tensor, up: Tensor) -> Tensor:
    """Return the (D_out, D_in) weight of its factors."""
    return (up.float() @ down.float()).to(up.dtype)


def _shape(group: UnitGroup) -> tuple[int, int]:
    down, up = group.members
    return up.shape[0], down.shape[1]
