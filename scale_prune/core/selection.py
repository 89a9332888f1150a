"""From scores and a budget to masks. Every rank calls this with the same scores and gets the same masks, bit for bit.

Ties are broken by order: the unit that comes first, in the earlier group, is kept.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_LOST = 0.95  # of a layer, by a budget
TEMPERATURE = 0.1  # of the softmax over layers' redundancy


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Keep the `count` highest scores; among equals the first.

    Args:
        scores: (N,) higher = keep.
        count: units to keep, in [0, N].

    Returns:
        (N,) bool, exactly `count` of them True.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:count]] = True
    return mask


def budget(remaining: float, total: int, *, nearest: bool = False) -> int:
    """Return how many of `total` units a fraction keeps, at least 1 and at most all.

    Args:
        remaining: the fraction.
        total: units.
        nearest: the nearest number, of two the larger one; by default what does not exceed the fraction.
    """
    return min(max(int(remaining * total + (0.5 if nearest else 0.0) + 1e-6), 1), total)


def select(
    scores: Sequence[Tensor],
    *,
    remaining: float,
    scope: str,
    min_kept: int = 1,
    width_multiple: int | Sequence[int] = 1,
    costs: Sequence[int] | None = None,
    dense_costs: Sequence[int] | None = None,
    dense_sizes: Sequence[int] | None = None,
    fractions: Sequence[float] | None = None,
    layers: Sequence[int] | None = None,
) -> list[Tensor]:
    """Choose the units that remain.

    Args:
        scores: one (N,) tensor a group, finite, higher = keep.
        remaining: fraction of the dense model to keep, above 0.
        scope: "global" and "standardized" rank all units together, "per_group" each group by itself.
        min_kept: units that every group keeps (or all it has, if fewer) under any scope but "per_group".
        width_multiple: of all groups or of each; widths are multiples, or dense ones, as near the budget as they can.
        costs: what a unit of each group counts; 1 by default.
        dense_costs, dense_sizes: what each group counts in the dense model, and its units there; by default as here.
        fractions: what remains of each group under scope "per_group"; `remaining` by default.
        layers: of each group, the layer that it is in, by default one of its own; under scope "per_group" the cheapest
            units of a layer make up for what the number of others is rounded by.

    Returns: one (N,) bool mask a group.
    """
    sizes = [len(group) for group in scores]
    costs = costs or [1] * len(sizes)
    dense_costs = dense_costs or [cost * size for cost, size in zip(costs, sizes, strict=True)]
    if alone := scope == "per_group":
        shares = zip(fractions or [remaining] * len(sizes), dense_costs, strict=True)
        masks = _select_each(scores, costs, [part * dense for part, dense in shares], layers or range(len(sizes)))
    else:
        masks = _select_global(scores, costs, int(remaining * sum(dense_costs) + 1e-6), min_kept)
    multiples = [width_multiple] * len(sizes) if isinstance(width_multiple, int) else width_multiple
    floor, shared = (1, False) if alone else (min_kept, len(set(costs)) == 1)
    return masks if set(multiples) == {1} else _rounded(scores, masks, multiples, dense_sizes or sizes, floor, shared)


def _rounded(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    multiples: Sequence[int],
    dense_sizes: Sequence[int],
    floor: int,
    shared: bool,
) -> list[Tensor]:
    """Return masks of widths that are multiples, of the highest scores."""
    widths = round_widths(
        [int(mask.sum()) for mask in masks],
        [len(group) for group in scores],
        multiples=multiples,
        dense_sizes=dense_sizes,
        min_kept=floor,
        shared_budget=shared,
    )
    return [top_mask(group, width) for group, width in zip(scores, widths, strict=True)]


def standardized(scores: Tensor) -> Tensor:
    """Return how far a group's scores are from their mean, in standard deviations."""
    spread = scores.double().std(correction=0)
    return ((scores.double() - scores.double().mean()) / spread.clamp(min=torch.finfo(torch.float64).tiny)).float()


def _select_each(
    scores: Sequence[Tensor], costs: Sequence[int], allowed: Sequence[float], layers: Sequence[int]
) -> list[Tensor]:
    """Rank each group by itself; keep the first of it that cost no more than is allowed, but one at least."""
    masks: dict[int, Tensor] = {}
    for layer in dict.fromkeys(layers):
        *dearer, cheapest = sorted(
            (index for index, other in enumerate(layers) if other == layer), key=lambda index: -costs[index]
        )
        left = allowed[cheapest]
        for index in dearer:
            part = allowed[index] / (costs[index] * len(scores[index]))
            masks[index] = top_mask(scores[index], budget(part, len(scores[index]), nearest=True))
            left += allowed[index] - costs[index] * int(masks[index].sum())
        part = left / (costs[cheapest] * len(scores[cheapest]))
        masks[cheapest] = top_mask(scores[cheapest], budget(part, len(scores[cheapest])))
    return [masks[index] for index in range(len(scores))]


def _select_global(scores: Sequence[Tensor], costs: Sequence[int], allowed: int, min_kept: int) -> list[Tensor]:
    """Rank all units together, each group's best `min_kept` before everything else; keep the first that are allowed."""
    sizes = [len(group) for group in scores]
    floors = [min(size, min_kept) for size in sizes]
    line = torch.cat([_lifted(group, floor) for group, floor in zip(scores, floors, strict=True)])
    each = torch.cat([torch.full((size,), cost) for size, cost in zip(sizes, costs, strict=True)]).to(line.device)
    order = line.argsort(descending=True, stable=True)
    affordable = each[order].cumsum(0) <= allowed
    affordable[: max(sum(floors), 1)] = True
    # What is left of the budget is less than the next unit costs, and may do for cheaper ones.
    cheapest = ~affordable & (each[order] == min(costs))
    left = max(allowed - int(each[order][affordable].sum()), 0)
    affordable |= cheapest & (cheapest.cumsum(0) <= left // min(costs))
    mask = torch.zeros_like(affordable)
    mask[order[affordable]] = True
    return list(mask.split(sizes))


def _lifted(scores: Tensor, floor: int) -> Tensor:
    """Put the `floor` highest scores above all others."""
    return scores.masked_fill(top_mask(scores, floor), float("inf")) if floor else scores


def round_widths(
    widths: Sequence[int],
    sizes: Sequence[int],
    *,
    multiples: Sequence[int],
    dense_sizes: Sequence[int],
    min_kept: int,
    shared_budget: bool,
) -> list[int]:
    """Round widths to multiples.

    Args:
        widths: units chosen in each group, at least 1.
        sizes: units each group has.
        multiples: of each group, at least 1.
        dense_sizes: units each group had in the dense model; a group that has and keeps them all stays as it is,
            whether or not its size is a multiple.
        min_kept: smallest width allowed before rounding up to a multiple.
        shared_budget: False rounds each group to the nearest multiple; True (scope "global") also brings the sum as
            near to that of `widths` as single steps of a multiple can, which is half a multiple where there is room.

    Returns:
        One width a group: a multiple of at least `min_kept`, or the group's size in the dense model, or all it has
        where that is less than one multiple.
    """
    smallest = [max(-(-min_kept // multiple), 1) * multiple for multiple in multiples]
    valid = []
    for width, size, least, multiple, dense in zip(widths, sizes, smallest, multiples, dense_sizes, strict=True):
        steps = [*range(least, size + 1, multiple)]
        if size == dense or not steps:
            steps = sorted({*steps, size})
        valid.append([size] if width == size in steps else steps)
    rounded = [
        max(options, key=lambda option, width=width: (-abs(option - width), option))
        for options, width in zip(valid, widths, strict=True)
    ]
    return _toward_sum(rounded, widths, valid) if shared_budget else rounded


def _toward_sum(rounded: Sequence[int], widths: Sequence[int], valid: Sequence[Sequence[int]]) -> list[int]:
    """Move one group by one step at a time, the one that is least off its own width then, while it helps the sum."""
    places = [options.index(width) for options, width in zip(valid, rounded, strict=True)]
    while True:
        excess = sum(options[place] for options, place in zip(valid, places, strict=True)) - sum(widths)
        step = -1 if excess > 0 else 1
        moves = {
            index: options[place + step]
            for index, (options, place) in enumerate(zip(valid, places, strict=True))
            if 0 <= place + step < len(options) and abs(excess + options[place + step] - options[place]) < abs(excess)
        }
        if not moves:
            return [options[place] for options, place in zip(valid, places, strict=True)]
        places[min(moves, key=lambda index: abs(moves[index] - widths[index]))] += step


def check_finite(scores: Tensor, group_name: str) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        ValueError: a score of the group is NaN or infinite.
    """
    bad = int((~scores.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(scores)} scores of group {group_name} are not finite, so its units cannot be ranked; "
            "the loss or a gradient probably overflowed in an earlier step"
        )


def group_fractions(
    budget: str, remaining: float, layers: Sequence[int], redundancy: Sequence[float], dense_costs: Sequence[int]
) -> list[float] | None:
    """Return the fraction of each group that remains under a budget, None where all lose alike.

    Args:
        budget: "uniform", "log" or "redundancy".
        remaining: fraction of all, in (0, 1].
        layers: of each group, the layer that it is in.
        redundancy: of each group's layer, for the budget of that name.
        dense_costs: what each group counts in the dense model.
    """
    if budget == "uniform":
        return None
    weights = dict.fromkeys(sorted(set(layers)), 0)
    for layer, cost in zip(layers, dense_costs, strict=True):
        weights[layer] += cost
    if budget == "log":
        fractions = log_fractions(remaining, [*weights.values()])
    else:
        cosines = [redundancy[layers.index(layer)] for layer in weights]
        fractions = redundancy_fractions(remaining, cosines, [*weights.values()])
    by_layer = dict(zip(weights, fractions, strict=True))
    return [by_layer[layer] for layer in layers]


def log_fractions(remaining: float, weights: Sequence[float]) -> list[float]:
    """Return the fraction of each layer that remains, so that later layers lose more and `remaining` of all is left.

    What the first layer loses is a quarter of what the last one does, and between them it rises with the logarithm of
    the layer's number. No layer loses all: what would be too much is lost by the others.

    Args:
        remaining: fraction of all, in (0, 1].
        weights: what each layer counts.

    Source: SlimGPT (arXiv 2412.18110), incremental pruning ratio, with the ratio of the authors' script.
    """
    layers = len(weights)
    rises = [math.log(layer + 1) / math.log(layers) if layers > 1 else 0.0 for layer in range(layers)]
    return fractions_of([1 + 3 * rise for rise in rises], remaining, weights)


def redundancy_fractions(remaining: float, redundancy: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the fraction of each layer that remains, so that layers which change little lose most.

    Args:
        remaining: fraction of all, in (0, 1].
        redundancy: of each layer, the mean cosine between what goes in and what comes out, in [-1, 1].
        weights: what each layer counts.

    Source: SlimLLM (arXiv 2505.22689), MoDeGPT (arXiv 2408.09632): losses by a softmax of the cosines, at 0.1.
    """
    losses = [math.exp((cosine - max(redundancy)) / TEMPERATURE) for cosine in redundancy]
    return fractions_of(losses, remaining, weights)


def fractions_of(losses: list[float], remaining: float, weights: Sequence[float]) -> list[float]:
    """Return what remains of each layer: losses are to each other as `losses`, up to MOST_LOST.

    Args:
        losses: one number above 0 a layer.
        remaining: fraction of all, in (0, 1].
        weights: what each layer counts.
    """
    low, high = 0.0, len(losses) / min(losses)
    for _ in range(100):  # halves the interval until it is one number
        factor = (low + high) / 2
        lost = sum(min(factor * loss, MOST_LOST) * weight for loss, weight in zip(losses, weights, strict=True))
        low, high = (factor, high) if lost < (1 - remaining) * sum(weights) else (low, factor)
    return [1 - min(low * loss, MOST_LOST) for loss in losses]
