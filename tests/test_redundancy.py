"""Cosines, correlations and explained variance against their definitions, whichever rows a rank keeps."""

import numpy as np
import pytest
import torch
from torch import Tensor

from scale_prune.core.redundancy import (
    Products,
    explained_variance,
    has_similar,
    mean_absolute,
    nearest,
)

T, N = 41, 13
CPU = torch.device("cpu")


def activations() -> Tensor:
    h = torch.randn(T, N, generator=torch.Generator().manual_seed(0)) + 0.5
    h[:, 4] = 2.0 * h[:, 1]  # repeats unit 1
    h[:, 7] = -h[:, 2]  # is its opposite
    h[:, 9] = 0.0  # never fires
    h[:, 11] = 3.0  # is constant
    return h


def products(first: int, last: int) -> Products:
    found = Products(N, first, last, CPU)
    for part in activations().split(10):
        found.update(part)
    return found


def expected_cosines() -> Tensor:
    h = activations().double()
    norms = h.norm(dim=0)
    return (h.T @ h / (norms * norms[:, None]).clamp(min=1e-30)).float()


@pytest.mark.parametrize(("first", "last"), [(0, N), (0, 5), (5, 12), (12, N)])
def test_rows_are_those_of_the_whole_matrix(first: int, last: int) -> None:
    found = products(first, last)
    torch.testing.assert_close(found.cosines(), expected_cosines()[first:last], rtol=1e-4, atol=1e-5)
    varying = [unit for unit in range(N) if unit not in (9, 11)]
    expected = torch.zeros(N, N)
    expected[np.ix_(varying, varying)] = torch.tensor(
        np.corrcoef(activations()[:, varying].double().numpy(), rowvar=False), dtype=torch.float32
    )
    torch.testing.assert_close(found.correlations(), expected[first:last], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("first", "last"), [(0, N), (3, 9)])
def test_neighbours_by_a_loop(first: int, last: int) -> None:
    cosines, whole = products(first, last).cosines(), expected_cosines()
    live = torch.arange(N) != 9
    for row, unit in enumerate(range(first, last)):
        others = [other for other in range(N) if other != unit]
        assert has_similar(cosines, first)[row] == any(whole[unit, j] >= 0.8 for j in range(unit + 1, N))
        assert float(nearest(cosines, first)[row]) == pytest.approx(float(whole[unit, others].abs().max()), abs=1e-5)
        mean = float(whole[unit, [j for j in others if j != 9]].abs().mean())
        assert float(mean_absolute(cosines, live, first)[row]) == pytest.approx(mean, abs=1e-5)


def test_of_two_units_that_repeat_each_other_one_is_similar_and_opposites_are_not() -> None:
    similar = has_similar(products(0, N).cosines(), 0)
    assert similar[1]
    assert not similar[4]
    assert not similar[2]
    assert float(nearest(products(0, N).cosines(), 0)[2]) == pytest.approx(1.0, abs=1e-5)


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
