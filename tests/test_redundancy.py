"""Cosines, correlations and explained variance against their definitions, whichever rows a rank keeps."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from scale_prune.core.redundancy import Products, explained_variance, has_similar, mean_absolute, nearest, sample_units

T, N = 41, 13


def activations() -> Tensor:
    h = torch.randn(T, N, generator=torch.Generator().manual_seed(0)) + 0.5
    h[:, 4] = 2.0 * h[:, 1]  # repeats unit 1
    h[:, 7] = -h[:, 2]  # is its opposite
    h[:, 9] = 0.0  # never fires
    h[:, 11] = 3.0  # is constant
    return h


def products(first: int, last: int, sample: Tensor | None = None) -> Products:
    found = Products(N, first, last, torch.arange(N) if sample is None else sample)
    for part in activations().split(10):
        found.update(torch.cat([part, torch.zeros(2, N)]))  # a rank with fewer tokens is filled up
    return found


def expected_cosines() -> Tensor:
    h = activations().double()
    norms = h.norm(dim=0)
    return (h.T @ h / (norms * norms[:, None]).clamp(min=1e-30)).float().fill_diagonal_(0.0)


SAMPLES = [None, (1, 2, 4, 8, 9), (0, 12)]


@pytest.mark.parametrize("units", SAMPLES)
@pytest.mark.parametrize(("first", "last"), [(0, N), (0, 5), (5, 12), (12, N)])
def test_rows_are_those_of_the_whole_matrix(first: int, last: int, units: tuple[int, ...] | None) -> None:
    sample = torch.arange(N) if units is None else torch.tensor(units)
    found = products(first, last, sample)
    torch.testing.assert_close(found.cosines(), expected_cosines()[first:last, sample], rtol=1e-4, atol=1e-5)
    varying = [unit for unit in range(N) if unit not in (9, 11)]
    expected = torch.zeros(N, N)
    expected[np.ix_(varying, varying)] = torch.tensor(
        np.corrcoef(activations()[:, varying].double().numpy(), rowvar=False), dtype=torch.float32
    )
    expected.fill_diagonal_(0.0)
    torch.testing.assert_close(found.correlations(), expected[first:last, sample], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("units", SAMPLES)
@pytest.mark.parametrize("cut", [0, 3, 9])
def test_neighbours_by_a_loop(cut: int, units: tuple[int, ...] | None) -> None:
    sample = torch.arange(N) if units is None else torch.tensor(units)
    whole, live = expected_cosines(), torch.arange(N) != 9
    parts = [(first, products(first, last, sample).cosines()) for first, last in ((0, cut), (cut, N)) if first < last]
    means = torch.cat([mean_absolute(cosines, live, first, sample) for first, cosines in parts])
    near = torch.stack([nearest(cosines) for _, cosines in parts]).amax(0)
    similar = torch.stack([has_similar(cosines, first, sample) for first, cosines in parts]).any(0)
    for place, unit in enumerate(sample.tolist()):
        assert similar[place] == any(whole[unit, j] >= 0.8 for j in range(unit + 1, N))
        assert float(near[place]) == pytest.approx(float(whole[unit].abs().max()), abs=1e-5)
    for unit in range(N):
        mean = whole[unit, [j for j in sample.tolist() if j not in (unit, 9)]].abs().mean()
        assert float(means[unit]) == pytest.approx(float(mean), abs=1e-5)


def test_of_two_units_that_repeat_each_other_one_is_similar_and_opposites_are_not() -> None:
    cosines = products(0, N).cosines()
    similar = has_similar(cosines, 0, torch.arange(N))
    assert similar[1]
    assert not similar[4]
    assert not similar[2]
    assert float(nearest(cosines)[2]) == pytest.approx(1.0, abs=1e-5)


def test_over_all_draws_the_mean_of_a_sample_is_the_mean() -> None:
    """Average over every sample of 3 units: similarity of each unit and uniqueness come out exactly."""
    live, everything = torch.ones(N, dtype=torch.bool), torch.arange(N)
    whole = products(0, N).cosines()
    draws = [torch.tensor(units) for units in combinations(range(N), 3)]
    means = torch.stack([mean_absolute(whole[:, draw], live, 0, draw) for draw in draws])
    for unit in range(N):
        others = [number for number, draw in enumerate(draws) if unit not in draw]
        exact = mean_absolute(whole, live, 0, everything)[unit]
        assert float(means[others, unit].mean()) == pytest.approx(float(exact), rel=1e-4)
        assert float(means[:, unit].mean()) == pytest.approx(float(exact), rel=1e-4)
    shares = torch.stack([has_similar(whole[:, draw], 0, draw).float().mean() for draw in draws])
    assert float(shares.mean()) == pytest.approx(float(has_similar(whole, 0, everything).float().mean()), rel=1e-4)


def test_a_sample_is_drawn_once() -> None:
    assert torch.equal(sample_units(N, None, 0), torch.arange(N))
    assert torch.equal(sample_units(N, N + 1, 0), torch.arange(N))
    drawn = sample_units(N, 5, 3)
    assert torch.equal(drawn, sample_units(N, 5, 3))
    assert not torch.equal(drawn, sample_units(N, 5, 4))
    assert len(set(drawn.tolist())) == 5
    assert drawn.tolist() == sorted(drawn.tolist())


def test_explained_variance_is_that_of_a_regression() -> None:
    h = torch.randn(200, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h[:, 5] = h[:, 0] - 2 * h[:, 3] + 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(2))
    centred = h - h.mean(0)
    found = explained_variance(centred.T @ centred / len(h))
    for unit in range(6):
        others = np.delete(centred.numpy(), unit, 1)
        residual = np.linalg.lstsq(others, centred[:, unit].numpy(), rcond=None)[1][0]
        assert float(found[unit]) == pytest.approx(1 - residual / float(centred[:, unit].square().sum()), abs=1e-4)


def test_a_unit_without_variance_is_not_explained_and_a_repeated_one_is() -> None:
    h = activations() - activations().mean(0)
    found = explained_variance(h.T @ h)
    assert found[[9, 11]].tolist() == [0.0, 0.0]
    assert found[[1, 2, 4, 7]].min() > 0.999
    assert explained_variance(torch.zeros(0, 0)).shape == (0,)  # of a layer none of whose sampled neurons lives
