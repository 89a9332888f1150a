"""Factors of a matrix, and the linear map that multiplies only what is live."""

import pytest
import torch
from torch import nn

from scale_prune.core.low_rank import generator_of, random_factors, saves, svd_factors, whitened_factors
from scale_prune.core.repair import gram_root
from scale_prune.models.factorized import FactorizedLinear

SHAPES = [(7, 13), (13, 7), (11, 11)]


def matrix(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_of_full_rank_are_the_matrix_and_balanced(shape: tuple[int, int]) -> None:
    down, up = svd_factors(matrix(shape), min(shape))
    torch.testing.assert_close(up @ down, matrix(shape), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=1e-4, atol=1e-6)
    assert (down.norm(dim=1).diff() <= 1e-6).all(), "largest first"


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_components_are_the_nearest_matrix_of_that_rank(shape: tuple[int, int], rank: int) -> None:
    down, up = svd_factors(matrix(shape), rank)
    assert down.shape == (rank, shape[1])
    assert up.shape == (shape[0], rank)
    missing = torch.linalg.svdvals(matrix(shape))[rank:]
    torch.testing.assert_close((up @ down - matrix(shape)).norm(), missing.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_factors_are_the_nearest_in_the_outputs(shape: tuple[int, int]) -> None:
    weight, inputs = matrix(shape), matrix((50, shape[1])) @ matrix((shape[1], shape[1]))
    root = gram_root(inputs.T @ inputs, shape[1], 0.0)
    down, up = whitened_factors(weight, root, min(shape))
    torch.testing.assert_close(up @ down, weight, rtol=1e-3, atol=1e-4)
    for rank in (1, 3, 5):
        down, up = whitened_factors(weight, root, rank)
        assert down.shape == (rank, shape[1])
        outputs, plain = inputs @ weight.T, svd_factors(weight, rank)
        tail = torch.linalg.svdvals(outputs)[rank:].square().sum()
        torch.testing.assert_close((outputs - inputs @ (up @ down).T).square().sum(), tail, rtol=1e-3, atol=1e-3)
        assert tail < (outputs - inputs @ (plain[1] @ plain[0]).T).square().sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_factors_are_balanced_however_many_tokens_there_are(shape: tuple[int, int]) -> None:
    weight, inputs = matrix(shape), matrix((50, shape[1])) @ matrix((shape[1], shape[1]))
    weight[:, -1] = weight[:, 0]
    weight[-1] = weight[0]  # so that a component is 0 but for rounding
    root = gram_root(inputs.T @ inputs, shape[1], 0.0)
    down, up = whitened_factors(weight, root, min(shape))
    torch.testing.assert_close(up @ down, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=1e-4, atol=1e-6)
    more = whitened_factors(weight, 1000 * root, min(shape) - 1)
    for few, many, units in ((down, more[0], 0), (up, more[1], 1)):
        expected = few.narrow(units, 0, min(shape) - 1)
        torch.testing.assert_close(many.abs(), expected.abs(), rtol=1e-3, atol=1e-4)  # a pair may change its sign
    nothing = whitened_factors(torch.zeros(shape), root, min(shape))
    assert not any(factor.any() for factor in nothing)


def test_random_factors_have_the_size_of_the_matrix_and_depend_on_seed_and_name() -> None:
    weight = 3.0 * torch.randn(211, 307, generator=torch.Generator().manual_seed(0))
    down, up = random_factors(weight, 101, generator_of(0, "a"))
    assert float((up @ down).std()) == pytest.approx(3.0, rel=0.05)
    again, _ = random_factors(weight, 101, generator_of(0, "a"))
    assert torch.equal(down, again)
    assert not torch.equal(down, random_factors(weight, 101, generator_of(1, "a"))[0])
    assert not torch.equal(down, random_factors(weight, 101, generator_of(0, "b"))[0])


@pytest.mark.parametrize(("rank", "shape", "smaller"), [(4, (10, 10), True), (5, (10, 10), False), (7, (10, 40), True)])
def test_factors_save_below_the_break_even(rank: int, shape: tuple[int, int], smaller: bool) -> None:
    assert saves(rank, shape) is smaller


@pytest.mark.parametrize("live", [[], [3], [0, 2, 5], list(range(7))])
def test_gates_that_are_zero_are_left_out_and_change_nothing(live: list[int]) -> None:
    down, up = (nn.Parameter(factor) for factor in svd_factors(matrix((11, 7)), 7))
    bias = nn.Parameter(torch.arange(11.0))
    layer = FactorizedLinear(down, up, bias)
    gates = torch.zeros(7)
    gates[live] = 0.3 + torch.rand(len(live), generator=torch.Generator().manual_seed(2))
    gates.requires_grad_()
    layer.gate = lambda module: gates
    x = matrix((5, 7))
    expected = x @ (up * gates @ down).T + bias
    torch.testing.assert_close(layer(x), expected)
    (by_layer,) = torch.autograd.grad(layer(x).square().sum(), gates)
    (directly,) = torch.autograd.grad(expected.square().sum(), gates)
    torch.testing.assert_close(by_layer[live], directly[live], rtol=1e-5, atol=1e-5)


def test_the_function_of_a_factorized_layer_is_that_of_the_dense_one() -> None:
    dense = nn.Linear(7, 11)
    down, up = svd_factors(dense.weight.detach(), 7)
    factors = FactorizedLinear(nn.Parameter(down), nn.Parameter(up), dense.bias)
    torch.testing.assert_close(factors(matrix((5, 7))), dense(matrix((5, 7))), rtol=1e-4, atol=1e-5)
