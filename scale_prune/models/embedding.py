"""A token table as factorized clusters of tokens, in the place of a model's embedding and of the output tied to it.

Shape letters: V_i tokens of a cluster, C_i its components, D model width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from scale_prune.core import UnitGroup
from scale_prune.models.factorized import component_group
from scale_prune.models.modeling_factorized import ClusteredEmbedding, ClusteredOutput, scale_of

CLUSTERS = ".clusters."
"""Part of the name of every cluster's group."""


class Cluster(nn.Module):
    """The embeddings of some tokens: up @ diag(gates) @ down.

    Args:
        down: (C_i, D).
        up: (V_i, C_i).

    Attributes:
        gate: tells the (C_i,) gates for this module's present mode, None where there are none.
    """

    def __init__(self, down: nn.Parameter, up: nn.Parameter) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.gate: Callable[[nn.Module], Tensor | None] | None = None

    def forward(self, x: Tensor, *, as_output: bool) -> Tensor:
        """Return (n, D) embeddings of (n,) places in the cluster; as output, (..., V_i) logits of (..., D)."""
        inner = linear(x, self.down) if as_output else embedding(x, self.up)
        gates = self.gate(self) if self.gate is not None else None
        inner = inner if gates is None else inner * gates.to(inner.dtype)
        return linear(inner, self.up) if as_output else inner @ self.down


class SketchedEmbedding(ClusteredEmbedding):
    """A clustered embedding of fake tensors, which cannot say how many tokens fall into a cluster.

    Every cluster looks all tokens up, so that what it takes is at most what it seems to.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """Return (..., D) of no values for (...) token ids."""
        parts = [cluster(ids.flatten(), as_output=False) for cluster in self.clusters]
        return torch.stack(parts).sum(0).view(*ids.shape, -1)


def put_clusters(
    model: nn.Module,
    names: Sequence[str],
    clusters: Sequence[Cluster],
    tokens: Sequence[Tensor],
    kind: type[ClusteredEmbedding] = ClusteredEmbedding,
) -> None:
    """Replace a model's embedding, and the output that is tied to it.

    Args:
        model: the model, changed in place.
        names: of the embedding, and of the output if it is tied.
        clusters: the clusters.
        tokens: the tokens of each.
        kind: the class of what takes the embedding's place.
    """
    line = torch.cat(list(tokens))
    place = torch.empty_like(line)
    place[line] = torch.arange(len(line), device=line.device)
    table = kind(clusters, [len(each) for each in tokens], place, scale_of(model.get_submodule(names[0])))
    for name, module in zip(names, (table, ClusteredOutput(table)), strict=False):
        parent, _, child = name.rpartition(".")
        training = model.get_submodule(name).training
        setattr(model.get_submodule(parent), child, module.train(training))


def tied_output(model: nn.Module) -> str:
    """Return the name of the output that a clustered embedding is tied to, "" where there is none."""
    return next((name for name, module in model.named_modules() if isinstance(module, ClusteredOutput)), "")


def cluster_groups(model: nn.Module) -> tuple[UnitGroup, ...]:
    """List the components of a model's clusters, one group a cluster."""
    names = [name for name, module in model.named_modules() if isinstance(module, Cluster)]
    return tuple(component_group(model, name, 0) for name in names)


def cluster_sizes(groups: Sequence[UnitGroup], widths: Sequence[int]) -> list[dict[str, int]]:
    """Return for each cluster of a clustered embedding, frequent tokens first, its size before and after.

    Args:
        groups: a model's groups, before they are compacted.
        widths: components that remain in each.
    """
    return [
        {
            "tokens": group.members[1].shape[0],
            "dense_parameters": group.dense_cost,
            "components_before": group.num_units,
            "components_after": width,
            "parameters_after": width * group.cost,
        }
        for group, width in zip(groups, widths, strict=True)
        if CLUSTERS in group.name
    ]
