"""The hard-concrete gate against sampling and autograd."""

import pytest
import torch

from scale_prune.core import hard_concrete
from scale_prune.core.hard_concrete import HIGH, LOW

LOG_ALPHAS = torch.tensor([-6.0, -2.4, -0.7, -1e-4, 0.0, 5e-4, 0.3, 1.9, 4.0], dtype=torch.float64)
DRAWS = 200_000


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.rand(DRAWS, len(LOG_ALPHAS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def drawn(noise: torch.Tensor) -> torch.Tensor:
    return hard_concrete.sample(LOG_ALPHAS, noise)


def test_gates_are_in_their_range_and_often_at_its_ends(drawn: torch.Tensor) -> None:
    assert float(drawn.min()) == 0.0
    assert float(drawn.max()) == 1.0


def test_the_probability_of_an_open_gate_is_that_of_sampling(drawn: torch.Tensor) -> None:
    error = (hard_concrete.open_probability(LOG_ALPHAS) - (drawn > 0).double().mean(0)).abs()
    assert (error < 5 * 0.5 / DRAWS**0.5).all()


def test_the_expected_number_of_open_gates_is_that_of_sampling(drawn: torch.Tensor) -> None:
    counted = (drawn > 0).sum(1).double()
    error = abs(float(hard_concrete.open_probability(LOG_ALPHAS).sum() - counted.mean()))
    assert error < 5 * float(counted.std()) / DRAWS**0.5


def test_the_mean_is_that_of_sampling(drawn: torch.Tensor) -> None:
    error = (hard_concrete.mean(LOG_ALPHAS) - drawn.mean(0)).abs()
    assert (error < 5 * 0.5 / DRAWS**0.5).all()


def test_free_gates_exceed_one_where_they_are_open_and_have_their_mean(
    noise: torch.Tensor, drawn: torch.Tensor
) -> None:
    free = hard_concrete.sample(LOG_ALPHAS, noise, free=True)
    far = LOG_ALPHAS > 3
    assert (free[:, far].amax(0) > 1.1).all()
    torch.testing.assert_close(free[:, ~far], drawn[:, ~far])
    assert ((free == 0) == (drawn == 0)).all()
    error = (hard_concrete.mean(LOG_ALPHAS, free=True) - free.mean(0)).abs()
    assert (error < 5 * 0.6 / DRAWS**0.5).all()


def test_the_mean_is_the_integral_to_all_digits() -> None:
    x = torch.linspace(-40.0, 40.0, 173, dtype=torch.float64)
    nodes = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    threshold = (nodes - LOW) / (HIGH - LOW)
    integral = torch.stack([(each - threshold.logit()).sigmoid().mean() for each in x])
    torch.testing.assert_close(hard_concrete.mean(x), integral, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("far", [80.0, 700.0, 1e4])
def test_far_out_the_mean_is_at_an_end(far: float) -> None:
    assert hard_concrete.mean(torch.tensor([-far, far])).tolist() == pytest.approx([0.0, 1.0], abs=1e-30)


@pytest.mark.parametrize("free", [False, True])
def test_the_gradient_is_that_of_autograd(free: bool) -> None:
    noise = torch.rand(31, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_alpha = LOG_ALPHAS.expand(31, -1).clone().requires_grad_()
    gates = hard_concrete.sample(log_alpha, noise, free=free)
    gates.sum().backward()
    assert log_alpha.grad is not None
    by_hand = hard_concrete.sample_gradient(log_alpha.detach(), noise, free=free)
    torch.testing.assert_close(by_hand, log_alpha.grad)
    clamped = (gates == 0) | (gates == 1)
    assert clamped.any()
    assert not log_alpha.grad[clamped].any()


@pytest.mark.parametrize("drop_rate", [0.05, 0.1, 0.5, 0.9])
def test_a_drop_rate_is_the_probability_of_the_lower_half(drop_rate: float) -> None:
    log_alpha = torch.tensor(hard_concrete.log_alpha_of(drop_rate), dtype=torch.float64)
    below = hard_concrete.sample(log_alpha, torch.tensor([drop_rate - 1e-9, drop_rate + 1e-9], dtype=torch.float64))
    assert (below < 0.5).tolist() == [True, False]
