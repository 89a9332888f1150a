"""Factors in the place of a sharded model's weights, before an engine is made around it.

One weight a rank is gathered at a time; the factors of each are computed by one rank and sharded like any parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from scale_prune.core import generator_of, random_factors, svd_factors, whitened_factors
from scale_prune.models import full_shape, put_clusters, put_factors
from scale_prune.models.embedding import Cluster

Factors = Callable[[str, Tensor, int], tuple[Tensor, Tensor]]
"""(name, (D_out, D_in) weight, C) -> down (C, D_in) and up (D_out, C), float32."""


def factors_of(kind: str, seed: int, roots: Mapping[str, Tensor]) -> Factors:
    """Return what makes factors.

    Args:
        kind: "svd", "whitened", "random", or "zeros" where a checkpoint's values take their place.
        seed: of random factors, which depend on the weight's name too, not on ranks.
        roots: (D_in, D_in) of `gram_root` by name, of weights that this rank makes whitened factors of; what has none
            on any rank, a table of tokens, gets those of "svd".
    """

    def make(name: str, weight: Tensor, num_components: int) -> tuple[Tensor, Tensor]:
        if name in roots:
            return whitened_factors(weight, roots[name], num_components)
        if kind in ("svd", "whitened"):
            return svd_factors(weight, num_components)
        if kind == "random":
            return random_factors(weight, num_components, generator_of(seed, name))
        rows, columns = weight.shape
        return torch.zeros(num_components, columns), torch.zeros(rows, num_components)

    return make


@torch.no_grad()
def factorize(
    model: nn.Module,
    names: Sequence[str],
    components: Callable[[tuple[int, int]], int],
    factors: Factors,
    *,
    transposed: bool,
) -> None:
    """Replace linear modules by their factors. A collective, and so are the gathers and broadcasts it is made of.

    Each rank receives every weight and its factors once: with P parameters in the weights about 3.5 P elements.

    Args:
        model: a model that ZeRO-3 has partitioned; changed in place.
        names: the linear modules.
        components: turns the (D_out, D_in) shape of a weight into its number of components.
        factors: makes the factors, on the device of the weight.
        transposed: weights are stored (in, out).

    Raises:
        ValueError: a weight has elements that are not finite.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(names), world_size):
        batch = names[first : first + world_size]
        own = [_whole(model, name, transposed, wanted=rank == owner) for owner, name in enumerate(batch)]
        made = None
        if rank < len(batch):
            weight = own[rank]
            made = factors(batch[rank], weight, components((weight.shape[0], weight.shape[1])))
        for owner, name in enumerate(batch):
            _put(model, name, made if rank == owner else None, owner, components, transposed)


def _whole(model: nn.Module, name: str, transposed: bool, *, wanted: bool) -> Tensor:
    """Return a (D_out, D_in) weight where it is wanted, nothing elsewhere. A collective."""
    weight: Any = model.get_submodule(name).weight
    with deepspeed.zero.GatheredParameters([weight]):
        _check_finite(weight, name)
        if not wanted:
            return torch.empty(0)
        return (weight.detach().T if transposed else weight.detach()).float().clone()


def _check_finite(weight: Tensor, name: str) -> None:
    """Refuse a gathered weight that has no singular values; all ranks see the same.

    Raises:
        ValueError: some of its elements are not finite.
    """
    broken = int((~weight.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{broken} of {weight.numel()} elements of {name}.weight are not finite, so it cannot be factorized; "
            "give a model whose weights are all numbers"
        )


def _put(
    model: nn.Module,
    name: str,
    made: tuple[Tensor, Tensor] | None,
    owner: int,
    components: Callable[[tuple[int, int]], int],
    transposed: bool,
) -> None:
    """Bring the owner's factors to all ranks, each of which keeps its shards."""
    weight: Any = model.get_submodule(name).weight
    shape = full_shape(weight)
    rows, columns = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    put_factors(model, name, *_sharded(made, (rows, columns), components((rows, columns)), weight, owner))


@torch.no_grad()
def factorize_embedding(
    model: nn.Module,
    names: Sequence[str],
    tokens: Sequence[Tensor],
    components: Callable[[tuple[int, int]], int],
    factors: Factors,
) -> None:
    """Replace an embedding, and the output tied to it, by factorized clusters of tokens. A collective.

    Every rank gathers the table once.

    Args:
        model: a model that ZeRO-3 has partitioned; changed in place.
        names: of the embedding, and of the output if it is tied.
        tokens: int64, the tokens of each cluster.
        components: turns the (V_i, D) shape of a cluster's table into its number of components.
        factors: makes the factors.

    Raises:
        ValueError: the embedding has elements that are not finite.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    weight: Any = model.get_submodule(names[0]).weight
    width = full_shape(weight)[1]
    own = {}
    with deepspeed.zero.GatheredParameters([weight]):
        _check_finite(weight, names[0])
        for index in range(rank, len(tokens), world_size):
            table = weight[tokens[index].to(weight.device)].float()
            own[index] = factors(f"{names[0]}.{index}", table, components((len(table), width)))
    clusters = []
    for index, each in enumerate(tokens):
        shape = (len(each), width)
        clusters.append(Cluster(*_sharded(own.get(index), shape, components(shape), weight, index % world_size)))
    put_clusters(model, names, clusters, [each.to(weight.device) for each in tokens])


def _sharded(
    made: tuple[Tensor, Tensor] | None, shape: tuple[int, int], count: int, like: Any, owner: int
) -> list[nn.Parameter]:
    """Return the factors that the owner made as sharded parameters, down and up. A collective."""
    rows, columns = shape
    parameters = []
    for index, size in enumerate(((count, columns), (rows, count))):
        values = made[index] if made is not None else torch.empty(size)
        # A copy even where it is contiguous: DeepSpeed wants a last stride of 1 also along an axis of one element.
        values = values.to(like.device, like.ds_tensor.dtype).clone(memory_format=torch.contiguous_format)
        dist.broadcast(values, owner)
        parameter = nn.Parameter(values)
        like.convert_to_zero_parameters(param_list=[parameter])
        parameters.append(parameter)
    return parameters
