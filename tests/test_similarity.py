"""Similarity against a plain loop over pairs; blocks of rows; running and per batch; dead and silent units."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from scale_prune.core import similarity
from scale_prune.core.similarity import Similarity, mean_absolute_cosine, similarity_of_live

UNITS, TOKENS = 11, 23
KINDS = ("batch", "running")


def activations(seed: int, tokens: int = TOKENS) -> Tensor:
    return torch.nn.functional.gelu(torch.randn(tokens, UNITS, generator=torch.Generator().manual_seed(seed)))


def some_live(seed: int = 0) -> Tensor:
    live = torch.rand(UNITS, generator=torch.Generator().manual_seed(seed)) < 0.6
    live[:2] = torch.tensor([True, False])
    return live


def naive(h: Tensor, live: Tensor) -> list[float]:
    """Return for each unit the mean of |cos| to the other live units, pair by pair."""
    columns = h.double().T.tolist()
    lengths = [math.sqrt(sum(x * x for x in column)) for column in columns]
    result = []
    for i, column in enumerate(columns):
        cosines = []
        for j, other in enumerate(columns):
            if j != i and live[j]:
                dot = sum(x * y for x, y in zip(column, other, strict=True))
                cosines.append(abs(dot) / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] else 0.0)
        result.append(sum(cosines) / len(cosines) if cosines else 0.0)
    return result


def whole(kind: str, weight: float = 1.0) -> Similarity:
    return Similarity(UNITS, 0, UNITS, kind=kind, weight=weight)


@pytest.mark.parametrize("live", [torch.ones(UNITS, dtype=torch.bool), some_live(0), some_live(1)])
@pytest.mark.parametrize("kind", KINDS)
def test_first_sample_equals_the_loop_over_pairs(kind: str, live: Tensor) -> None:
    h = activations(0)
    expected = torch.tensor(naive(h, live))
    torch.testing.assert_close(whole(kind, 0.3).update(h, live), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("live", [torch.ones(UNITS, dtype=torch.bool), some_live(0)])
def test_running_is_the_cosine_of_weighted_sums_of_products(live: Tensor) -> None:
    weight, running = 0.3, whole("running", 0.3)
    for seed in range(4):
        found = running.update(activations(seed), live)
    # Tokens of sample s, scaled by the root of its share, have exactly these sums of products.
    shares = [0.7**3, 0.3 * 0.7**2, 0.3 * 0.7, weight]
    tokens = torch.cat([activations(seed) * math.sqrt(share) for seed, share in enumerate(shares)])
    torch.testing.assert_close(found[live], torch.tensor(naive(tokens, live))[live], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("live", [torch.ones(UNITS, dtype=torch.bool), some_live(0)])
def test_batch_is_the_weighted_mean_of_the_samples_similarities(live: Tensor) -> None:
    batch = whole("batch", 0.3)
    for seed in range(3):
        found = batch.update(activations(seed), live)
    one, two, three = (torch.tensor(naive(activations(seed), live)) for seed in range(3))
    expected = 0.7 * (0.7 * one + 0.3 * two) + 0.3 * three
    torch.testing.assert_close(found[live], expected[live], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_at_once", [2, 1024])
@pytest.mark.parametrize(("first", "last"), [(0, UNITS), (0, 4), (3, 9), (5, 5), (7, UNITS)])
@pytest.mark.parametrize("live", [torch.ones(UNITS, dtype=torch.bool), some_live(0), torch.arange(UNITS) == 8])
def test_removed_units_and_the_other_half_of_pairs_need_no_products(
    live: Tensor, first: int, last: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "ROWS_AT_ONCE", rows_at_once)
    h = activations(0)
    h[:, 8] = 0.0
    found = similarity_of_live(h, live, first, last)
    expected = torch.tensor(naive(h, live))[first:last]
    torch.testing.assert_close(found[live[first:last]], expected[live[first:last]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("live", [torch.ones(UNITS, dtype=torch.bool), some_live(0)])
def test_with_the_whole_weight_on_the_newest_sample_both_kinds_agree(live: Tensor) -> None:
    batch, running = whole("batch"), whole("running")
    for seed in range(3):
        h = activations(seed)
        torch.testing.assert_close(batch.update(h, live), running.update(h, live), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 1024])
@pytest.mark.parametrize("edges", [(0, 11), (0, 4, 11), (0, 1, 2, 7, 11), (0, 5, 5, 11)])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_make_up_the_whole(
    kind: str, edges: tuple[int, ...], rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = whole(kind, 0.4)
    expected = [reference.update(activations(seed), some_live(seed)).clone() for seed in range(3)]
    monkeypatch.setattr(similarity, "ROWS_AT_ONCE", rows_at_once)
    blocks = [Similarity(UNITS, first, last, kind=kind, weight=0.4) for first, last in pairwise(edges) if first < last]
    for seed in range(3):
        found = torch.cat([block.update(activations(seed), some_live(seed)) for block in blocks])
        torch.testing.assert_close(found, expected[seed], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_one_direction_have_similarity_one(kind: str) -> None:
    factors = torch.tensor([1.0, 1.0, -0.5, 3.0, -7.0, 1e-3, 1.0, 2.0, 5.0, -1.0, 0.1])
    found = whole(kind).update(activations(0)[:, :1] * factors, torch.ones(UNITS, dtype=torch.bool))
    torch.testing.assert_close(found, torch.ones(UNITS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal_units_have_similarity_zero_and_a_pair_that_is_doubled_one(kind: str) -> None:
    h = torch.eye(UNITS + 2)[:, :UNITS]
    h[:, 3] = 2 * h[:, 8]
    found = whole(kind).update(h, torch.ones(UNITS, dtype=torch.bool))
    expected = torch.zeros(UNITS)
    expected[[3, 8]] = 1 / (UNITS - 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_units_count_for_nobody_and_keep_their_last_value(kind: str) -> None:
    live, tracker = some_live(), whole(kind)
    before = tracker.update(activations(0), torch.ones(UNITS, dtype=torch.bool)).clone()
    h = activations(1)
    found = tracker.update(h, live)
    assert torch.equal(found[~live], before[~live])
    h[:, ~live] = 1e3 * activations(2)[:, ~live]
    again = whole(kind)
    again.update(activations(0), torch.ones(UNITS, dtype=torch.bool))
    torch.testing.assert_close(again.update(h, live)[live], found[live])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_count_as_nothing(kind: str) -> None:
    live, padded, plain = some_live(), whole(kind, 0.4), whole(kind, 0.4)
    for seed in range(2):
        h = activations(seed)
        with_rows = torch.cat([torch.zeros(5, UNITS), h[:7], torch.zeros(3, UNITS), h[7:]])
        torch.testing.assert_close(padded.update(with_rows, live), plain.update(h, live))


@pytest.mark.parametrize("kind", KINDS)
def test_a_silent_unit_has_similarity_zero(kind: str) -> None:
    h = activations(0)
    h[:, 4] = 0.0
    found = whole(kind).update(h, torch.ones(UNITS, dtype=torch.bool))
    assert found[4] == 0.0
    torch.testing.assert_close(found, torch.tensor(naive(h, torch.ones(UNITS))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_live_unit_has_nobody_to_be_like(kind: str) -> None:
    live = torch.arange(UNITS) == 5
    assert whole(kind).update(activations(0), live)[5] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_a_unit_does_not_matter_in_half_precision_either(kind: str) -> None:
    live, h = some_live(), activations(0)
    scaled = (h * torch.logspace(-4, 4, UNITS)).bfloat16()
    torch.testing.assert_close(whole(kind).update(scaled, live), whole(kind).update(h, live), rtol=0.05, atol=0.01)


def test_mean_absolute_cosine_of_a_block() -> None:
    products = torch.tensor([[1.0, -2.0, 3.0], [4.0, 4.0, -6.0]])
    squares, live = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([True, True, True])
    # Units 1 and 2; |-2| is not unit 1's own product, the diagonal starts at column 1.
    found = mean_absolute_cosine(products, squares, live, first=1)
    torch.testing.assert_close(found, torch.tensor([(1 / 2 + 3 / 6) / 2, (4 / 3 + 4 / 6) / 2]))
