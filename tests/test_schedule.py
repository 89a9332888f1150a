"""The cubic schedule: its formula, its ends, and which steps choose masks."""

from dataclasses import replace
from itertools import pairwise, product

import pytest

from scale_prune.core.schedule import Schedule

FRACTIONS = [
    pair for pair in product((0.0, 0.01, 0.1, 1 / 3, 0.5, 0.7, 0.9, 0.99, 0.999), repeat=2) if sum(pair) <= 1
] + [(0.3, 0.7), (0.7, 0.3), (0.0, 1 - 1e-9)]
TOTALS = (1, 2, 3, 7, 100, 997)


def schedules(target: float = 0.25, update_every: int = 1) -> list[Schedule]:
    return [
        Schedule(
            total_steps=total,
            target=target,
            warmup_fraction=warmup,
            cooldown_fraction=cooldown,
            update_every=update_every,
        )
        for total, (warmup, cooldown) in product(TOTALS, FRACTIONS)
    ]


@pytest.mark.parametrize(
    ("step", "remaining"),
    # v = v_f + (v_0 - v_f) * (1 - (t - w) / (N - w - c))^3 by hand, with v_0 = 1, v_f = 0.2, N = 100, w = 10, c = 30.
    [
        (1, 1.0),
        (10, 1.0),
        (11, 0.2 + 0.8 * (59 / 60) ** 3),
        (25, 0.2 + 0.8 * 0.75**3),
        (40, 0.2 + 0.8 * 0.5**3),
        (55, 0.2 + 0.8 * 0.25**3),
        (69, 0.2 + 0.8 * (1 / 60) ** 3),
        (70, 0.2),
        (71, 0.2),
        (100, 0.2),
        (1000, 0.2),
    ],
)
def test_remaining_by_the_formula(step: int, remaining: float) -> None:
    schedule = Schedule(total_steps=100, target=0.2, warmup_fraction=0.1, cooldown_fraction=0.3)
    assert schedule.remaining(step) == pytest.approx(remaining, rel=1e-12)


@pytest.mark.parametrize("target", [1e-6, 0.25, 0.9, 1.0])
def test_it_starts_dense_never_rises_and_ends_at_the_target(target: float) -> None:
    for schedule in schedules(target):
        values = [schedule.remaining(step) for step in range(schedule.total_steps + 1)]
        assert all(value == 1.0 for value in values[: schedule.warmup_steps + 1])
        assert all(later <= earlier for earlier, later in pairwise(values))
        assert values[-1] == pytest.approx(target, rel=1e-9)
        assert set(values[schedule.last_descent_step :]) <= {values[-1]}
        assert min(values) >= target * (1 - 1e-9)


def test_the_stages_have_the_asked_lengths() -> None:
    for schedule in schedules():
        total = schedule.total_steps
        assert abs(schedule.warmup_steps - schedule.warmup_fraction * total) < 1
        assert schedule.warmup_steps < schedule.last_descent_step <= total
        at_target = total - schedule.last_descent_step
        assert schedule.cooldown_fraction * total - 2 < at_target < schedule.cooldown_fraction * total + 1


@pytest.mark.parametrize(
    ("update_every", "updated"),
    [
        (1, [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (2, [2, 4, 6, 7, 8, 10, 11]),
        (3, [3, 6, 7, 9, 11]),
        (100, [7, 11]),
    ],
)
def test_steps_that_choose_masks(update_every: int, updated: list[int]) -> None:
    schedule = Schedule(
        total_steps=11, target=0.5, warmup_fraction=0.1, cooldown_fraction=0.4, update_every=update_every
    )
    assert (schedule.warmup_steps, schedule.last_descent_step) == (1, 7)
    assert [step for step in range(1, 12) if schedule.updates(step)] == updated


@pytest.mark.parametrize("update_every", [1, 7, 10_000])
def test_masks_are_chosen_at_the_target_and_at_the_end_but_never_while_dense(update_every: int) -> None:
    for schedule in schedules(update_every=update_every):
        assert schedule.updates(schedule.last_descent_step)
        assert schedule.updates(schedule.total_steps)
        assert not any(schedule.updates(step) for step in range(schedule.warmup_steps + 1))


@pytest.mark.parametrize("update_every", [1, 7, 10_000])
def test_what_settles_is_chosen_for_the_last_time_when_the_target_is_reached(update_every: int) -> None:
    for usual in schedules(update_every=update_every):
        assert usual.last_pruning_step == usual.total_steps
        settled = replace(usual, settles=True)
        assert settled.last_pruning_step == settled.last_descent_step == usual.last_descent_step
        chosen = [step for step in range(settled.total_steps + 1) if settled.updates(step)]
        assert chosen == [step for step in range(settled.last_descent_step + 1) if usual.updates(step)]
        assert replace(settled, target=1.0).last_pruning_step == usual.total_steps


def test_plain_fine_tuning_chooses_none() -> None:
    assert not any(schedule.updates(step) for schedule in schedules(1.0) for step in range(schedule.total_steps + 1))


def test_learning_rate_of_scores_rises_over_warm_up_and_falls_to_the_last_step() -> None:
    schedule = Schedule(total_steps=10, target=0.5, warmup_fraction=0.4, cooldown_fraction=0.3)
    rates = [schedule.learning_rate(step) for step in range(1, 12)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0.0])


def test_learning_rate_of_scores_is_positive_in_every_step() -> None:
    for schedule in schedules():
        assert all(0 < schedule.learning_rate(step) <= 1 for step in range(1, schedule.total_steps + 1))
