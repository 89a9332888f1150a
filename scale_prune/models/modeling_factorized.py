"""A causal language model some of whose linear maps are products of two smaller ones, and its token table too.

Written beside a pruned model's weights, for `from_pretrained(folder, trust_remote_code=True)`. It is the model of
`transformers` in everything else. The ranks stand in config.json, under `factorized` and `factorized_embedding`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM, __version__

if tuple(map(int, __version__.split(".")[:2])) < (5, 14):  # older ones name some weights otherwise
    raise ImportError(f"this model needs transformers 5.14 or newer, here is {__version__}")


class FactorizedGPTNeoConfig(GPTNeoConfig):
    # One of its own, so that nothing loads this model without this file: the weights that it lacks would be random.
    model_type = "factorized_gpt_neo"
    _auto_class = "AutoConfig"  # makes save_pretrained copy this file along


class FactorizedGPTNeoForCausalLM(GPTNeoForCausalLM):
    config_class = FactorizedGPTNeoConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: FactorizedGPTNeoConfig) -> None:
        super().__init__(config)
        settings = config.to_dict()
        for name, rank in settings.get("factorized", {}).items():
            _put(self, name, _factors(self.get_submodule(name), rank))
        if clusters := settings.get("factorized_embedding"):
            sizes, ranks = clusters["sizes"], clusters["ranks"]
            old: Any = self.get_submodule(clusters["names"][0])
            made = [Cluster(old.embedding_dim, size, rank) for size, rank in zip(sizes, ranks, strict=True)]
            table = ClusteredEmbedding(made, sizes, torch.arange(sum(sizes)), scale_of(old))
            for name, module in zip(clusters["names"], (table, ClusteredOutput(table)), strict=False):
                _put(self, name, module)
        self.post_init()


class Cluster(nn.Module):
    """The embeddings of some tokens."""

    def __init__(self, width: int, size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.empty(size, rank))

    def forward(self, x: Tensor, *, as_output: bool) -> Tensor:
        if as_output:
            return x @ self.down.T @ self.up.T
        return self.up[x] @ self.down


class ClusteredEmbedding(nn.Module):
    """Token ids to embeddings, by clusters of tokens; `place` says where a token stands in the line of all clusters."""

    def __init__(self, clusters: Sequence[nn.Module], sizes: Sequence[int], place: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.clusters = nn.ModuleList(clusters)
        self.bounds = [*pairwise(accumulate(sizes, initial=0))]
        self.register_buffer("place", place)

    def forward(self, ids: Tensor) -> Tensor:
        places: Tensor = self.get_buffer("place")[ids]
        found = None
        # All clusters, whichever tokens there are: under ZeRO-3 every rank must do the same.
        for cluster, (first, last) in zip(self.clusters, self.bounds, strict=True):
            inside = (places >= first) & (places < last)
            part = cluster(places[inside] - first, as_output=False)
            found = part.new_zeros(*ids.shape, part.shape[-1]) if found is None else found
            found = found.masked_scatter(inside[..., None], part)
        assert found is not None
        return found if self.scale == 1.0 else found * found.new_tensor(self.scale)


def scale_of(table: nn.Module) -> float:
    # Gemma's token table multiplies what it looks up, and its output does not.
    return float(getattr(table, "scalar_embed_scale", 1.0))


class ClusteredOutput(nn.Module):
    """Logits by the embedding, which it does not own."""

    def __init__(self, table: ClusteredEmbedding) -> None:
        super().__init__()
        self.__dict__["table"] = table  # no submodule, so that nothing is stored twice

    def forward(self, x: Tensor) -> Tensor:
        table: ClusteredEmbedding = self.__dict__["table"]
        parts = [cluster(x, as_output=True) for cluster in table.clusters]
        return torch.cat(parts, -1)[..., table.get_buffer("place")]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _factors(linear: Any, rank: int) -> nn.Sequential:
    # The second names are those of the Conv1D of transformers.
    d_in = linear.in_features if hasattr(linear, "in_features") else linear.nx
    d_out = linear.out_features if hasattr(linear, "out_features") else linear.nf
    up = nn.Linear(rank, d_out, bias=linear.bias is not None)
    return nn.Sequential(OrderedDict(down=nn.Linear(d_in, rank, bias=False), up=up))
