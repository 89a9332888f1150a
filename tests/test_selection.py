"""Laws of choosing: exact counts, floors, order, ties, budgets, rounding of widths."""

import math
from collections.abc import Sequence
from itertools import combinations, pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from scale_prune.core.selection import (
    budget,
    check_finite,
    group_fractions,
    log_fractions,
    redundancy_fractions,
    round_widths,
    select,
    standardized,
    top_mask,
)

SIZES = (7, 13, 1, 29)
REMAINING = (1e-9, 0.02, 0.1, 0.25, 0.5, 0.77, 0.999, 1.0)
SCOPES = ("global", "per_group")


def random_scores(seed: int, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def widths(masks: list[Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in masks]


@pytest.mark.parametrize(
    ("remaining", "total", "kept"),
    [(0.5, 7, 3), (1.0, 7, 7), (0.25, 100, 25), (0.29, 100, 29), (0.57, 100, 57), (1e-9, 7, 1), (1 / 3, 3, 1)],
)
def test_budget(remaining: float, total: int, kept: int) -> None:
    assert budget(remaining, total) == kept


def test_budget_of_a_fraction_of_whole_units_is_those_units() -> None:
    assert all(budget(kept / total, total) == kept for total in range(1, 200) for kept in range(1, total + 1))


@pytest.mark.parametrize("count", range(8))
def test_among_equals_the_first_are_kept(count: int) -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 0.0, 2.0, -0.0, 1.0])
    kept = sorted([1, 4, 0, 2, 6, 3, 5][:count])
    assert top_mask(scores, count).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("remaining", REMAINING)
def test_global_keeps_exactly_the_budget_and_the_highest(remaining: float, seed: int) -> None:
    scores = random_scores(seed)
    masks = select(scores, remaining=remaining, scope="global", min_kept=0)
    kept, line = torch.cat(masks), torch.cat(scores)
    assert kept.sum() == budget(remaining, sum(SIZES))
    assert kept.all() or line[kept].min() > line[~kept].max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("remaining", REMAINING)
def test_per_group_keeps_exactly_each_budget_and_the_highest(remaining: float, seed: int) -> None:
    scores = random_scores(seed)
    for group, mask in zip(scores, select(scores, remaining=remaining, scope="per_group"), strict=True):
        assert mask.sum() == budget(remaining, len(group))
        assert mask.all() or group[mask].min() > group[~mask].max()


@pytest.mark.parametrize("min_kept", [1, 2, 5, 8])
@pytest.mark.parametrize("remaining", REMAINING)
def test_every_group_keeps_the_floor_and_the_total_is_the_budget(remaining: float, min_kept: int) -> None:
    scores = random_scores(0)
    scores[1] -= 100.0  # would lose everything
    floors = [min(min_kept, size) for size in SIZES]
    masks = select(scores, remaining=remaining, scope="global", min_kept=min_kept)
    assert all(kept >= floor for kept, floor in zip(widths(masks), floors, strict=True))
    assert sum(widths(masks)) == max(budget(remaining, sum(SIZES)), sum(floors))
    assert all(torch.equal(mask, top_mask(group, int(mask.sum()))) for group, mask in zip(scores, masks, strict=True))


def test_the_floor_changes_nothing_where_no_group_is_below_it() -> None:
    scores = random_scores(1)
    free = select(scores, remaining=0.5, scope="global", min_kept=0)
    assert min(widths(free)) == 1
    floored = select(scores, remaining=0.5, scope="global", min_kept=1)
    assert all(torch.equal(one, other) for one, other in zip(free, floored, strict=True))


@pytest.mark.parametrize("width_multiple", [1, 4])
@pytest.mark.parametrize("remaining", REMAINING)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_order_of_units_does_not_matter(scope: str, remaining: float, width_multiple: int) -> None:
    scores = random_scores(2)
    orders = [torch.randperm(size, generator=torch.Generator().manual_seed(size)) for size in SIZES]
    shuffled = [group[order] for group, order in zip(scores, orders, strict=True)]
    masks = select(scores, remaining=remaining, scope=scope, width_multiple=width_multiple)
    again = select(shuffled, remaining=remaining, scope=scope, width_multiple=width_multiple)
    assert all(torch.equal(mask[order], other) for mask, order, other in zip(masks, orders, again, strict=True))


@pytest.mark.parametrize("min_kept", [1, 3])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ties", [False, True])
def test_a_smaller_budget_keeps_a_subset(ties: bool, scope: str, min_kept: int) -> None:
    scores = [(group * 2).round() if ties else group for group in random_scores(3)]
    nested = [torch.cat(select(scores, remaining=kept / 50, scope=scope, min_kept=min_kept)) for kept in range(1, 51)]
    assert all(not (smaller & ~larger).any() for smaller, larger in pairwise(nested))


def test_ties_over_groups_go_to_the_earlier_group() -> None:
    masks = select([torch.zeros(3), torch.zeros(5)], remaining=0.5, scope="global")
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[0, 1, 2], [0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_cannot_be_ranked_name_the_group(bad: float) -> None:
    scores = torch.zeros(7)
    check_finite(scores, "transformer.h.0.mlp")
    scores[3] = bad
    with pytest.raises(ValueError, match=r"1 of 7 scores of group transformer\.h\.0\.mlp are not finite"):
        check_finite(scores, "transformer.h.0.mlp")


# --- widths in multiples ---------------------------------------------------------------------------------------------


def rounded(widths: Sequence[int], sizes: Sequence[int], multiple: int, **more: Any) -> list[int]:
    """Round the widths of groups that are whole, unless `dense_sizes` says otherwise."""
    return round_widths(
        widths, sizes, **{"multiples": [multiple] * len(sizes), "dense_sizes": sizes, "min_kept": 1, **more}
    )


def valid_widths(size: int, multiple: int) -> set[int]:
    """Return the multiples up to a size, and the size."""
    return {*range(multiple, size, multiple), size}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("remaining", REMAINING)
@pytest.mark.parametrize("multiple", [2, 4, 8, 64])
@pytest.mark.parametrize("scope", SCOPES)
def test_widths_are_multiples_of_the_highest_scores(scope: str, multiple: int, remaining: float, seed: int) -> None:
    scores = random_scores(seed)
    masks = select(scores, remaining=remaining, scope=scope, width_multiple=multiple)
    for group, mask in zip(scores, masks, strict=True):
        assert int(mask.sum()) in valid_widths(len(group), multiple)
        assert torch.equal(mask, top_mask(group, int(mask.sum())))


@pytest.mark.parametrize("multiple", [2, 3, 4])
@pytest.mark.parametrize("sizes", [(7, 8, 5), (8, 8, 8), (3, 8, 8), (9, 2, 1)])
def test_a_shared_budget_is_met_within_half_a_multiple(sizes: tuple[int, ...], multiple: int) -> None:
    for before in product(*(range(1, size + 1) for size in sizes)):
        after = rounded(before, sizes, multiple, shared_budget=True)
        assert all(width in valid_widths(size, multiple) for width, size in zip(after, sizes, strict=True))
        least = sum(size if width == size else min(multiple, size) for width, size in zip(before, sizes, strict=True))
        assert 2 * abs(sum(after) - max(sum(before), least)) <= multiple, (before, after)


@pytest.mark.parametrize("shared_budget", [True, False])
@pytest.mark.parametrize("multiple", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("sizes", [(7, 8, 5), (3, 8, 8), (9, 2, 1)])
def test_a_full_group_stays_full(sizes: tuple[int, ...], multiple: int, shared_budget: bool) -> None:
    for before in product(*({1, size // 2 or 1, size - 1 or 1, size} for size in sizes)):
        after = rounded(before, sizes, multiple, shared_budget=shared_budget)
        assert all(new == size for old, new, size in zip(before, after, sizes, strict=True) if old == size)


@pytest.mark.parametrize("multiple", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 5, 7, 8, 17])
def test_without_a_shared_budget_each_width_goes_to_the_nearest(size: int, multiple: int) -> None:
    for width in range(1, size + 1):
        (after,) = rounded([width], [size], multiple, shared_budget=False)
        assert abs(after - width) == min(abs(valid - width) for valid in valid_widths(size, multiple))


@pytest.mark.parametrize(("min_kept", "least"), [(1, 4), (4, 4), (5, 8), (9, 11)])
def test_rounding_keeps_the_floor(min_kept: int, least: int) -> None:
    after = rounded([min_kept, 11, 11], [11, 29, 29], 4, min_kept=min_kept, shared_budget=True)
    assert after[0] >= least


def test_multiples_that_fit_change_nothing() -> None:
    before = [width for pair in combinations(range(4, 17, 4), 2) for width in pair]
    for shared_budget in (True, False):
        sizes = [16] * len(before)
        after = rounded(before, sizes, 4, shared_budget=shared_budget)
        assert after == before


@pytest.mark.parametrize("multiple", [2, 3, 4, 8])
@pytest.mark.parametrize("shared_budget", [True, False])
def test_a_group_that_has_lost_units_keeps_a_multiple(multiple: int, shared_budget: bool) -> None:
    sizes, dense_sizes = (7, 9, 3, 16), (17, 17, 17, 17)
    for before in product(*({1, size - 1, size} for size in sizes)):
        after = rounded(before, sizes, multiple, dense_sizes=dense_sizes, shared_budget=shared_budget)
        for width, size in zip(after, sizes, strict=True):
            assert width <= size
            assert width % multiple == 0 or width == size < multiple


# --- budgets of layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remaining", [0.9, 0.75, 0.5, 0.3])
@pytest.mark.parametrize("layers", [1, 2, 12, 30])
def test_log_budgets_keep_the_mean_and_take_more_from_later_layers(layers: int, remaining: float) -> None:
    fractions = log_fractions(remaining, [2.0] * layers)
    assert sum(fractions) / layers == pytest.approx(remaining)
    assert fractions == sorted(fractions, reverse=True)
    assert all(0 < fraction < 1 for fraction in fractions)
    if layers > 1 and fractions[-1] > 0.06:
        assert (1 - fractions[-1]) / (1 - fractions[0]) == pytest.approx(4)


@pytest.mark.parametrize("remaining", [0.9, 0.75, 0.5, 0.3])
def test_redundant_layers_lose_most_and_none_loses_all(remaining: float) -> None:
    cosines = [0.3, 0.95, 0.8, 0.99]
    fractions = redundancy_fractions(remaining, cosines, [2.0] * len(cosines))
    assert sum(fractions) / 4 == pytest.approx(remaining)
    assert fractions[0] == max(fractions)
    assert fractions[3] == min(fractions) >= 0.05 - 1e-9
    if min(fractions) > 0.06:
        assert (1 - fractions[1]) / (1 - fractions[2]) == pytest.approx(math.exp(1.5))
    assert redundancy_fractions(remaining, [0.7] * 4, [1.0] * 4) == pytest.approx([remaining] * 4)


def test_layers_count_by_what_they_have() -> None:
    kept = log_fractions(0.5, [3072.0, 768.0])
    assert sum(part * size for part, size in zip(kept, (3072, 768), strict=True)) == pytest.approx(0.5 * (3072 + 768))
    costs = [10, 30, 30, 90]  # neurons and heads of two layers
    groups = group_fractions("redundancy", 0.4, [0, 0, 1, 1], [0.9, 0.9, 0.8, 0.8], costs)
    assert groups is not None
    assert sum(part * cost for part, cost in zip(groups, costs, strict=True)) == pytest.approx(0.4 * sum(costs))


def test_standardized_ranking_is_blind_to_the_groups_scales() -> None:
    scores = [torch.tensor([1.0, 2, 3, 9]), torch.tensor([100.0, 200, 300, 900]), torch.full((3,), 7.0)]
    masks = select([standardized(group) for group in scores], remaining=4 / 11, scope="standardized")
    assert [mask.tolist() for mask in masks[:2]] == [[False, False, False, True]] * 2
    assert sum(int(mask.sum()) for mask in masks) == 4
    assert [int(mask.sum()) for mask in select(scores, remaining=4 / 11, scope="global")] == [1, 2, 1]
    halves = select(scores[:2], remaining=0.5, scope="per_group", fractions=[0.75, 0.25])
    assert [int(mask.sum()) for mask in halves] == [3, 1]
