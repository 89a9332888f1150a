"""Laws of every criterion that registers, and the formula of each."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from memory_backend import InMemoryBackend, token_blocks, train
from models import VOCABULARY, tiny_model, tokens
from torch import Tensor

from scale_prune.config.settings import PruningConfig
from scale_prune.core.groups import Member, Role, UnitGroup, UnitLayout
from scale_prune.core.schedule import Schedule
from scale_prune.core.shards import shard_bounds
from scale_prune.criteria import CRITERIA, Criterion, Moment, ShardView, State, with_defaults
from scale_prune.models.layer_units import unit_groups
from scale_prune.pruning.pruner import Pruner


def group_of(name: str, num_units: int, layer: int) -> UnitGroup:
    return UnitGroup(name=name, layer=layer, num_units=num_units, members=(), output="")


GROUPS = tuple(group_of(f"layers.{layer}.mlp", width, layer) for layer, width in enumerate((7, 13, 2, 5)))
M = sum(group.num_units for group in GROUPS)
SCHEDULE = Schedule(total_steps=11, target=0.5, warmup_fraction=0.2, cooldown_fraction=0.3)
WITH_SHARE = [name for name, criterion in CRITERIA.items() if criterion.needs & {"weight", "grad"}]
CHOOSING = [name for name in CRITERIA if name != "factorize"]
BY_GRADIENT = [name for name, criterion in CRITERIA.items() if "grad" in criterion.needs]

# Shape, the axis that counts units, role; means over 4 are exact.
MEMBERS: list[tuple[tuple[int, ...], int, Role]] = [((7, 4), 0, "in"), ((4, 7), 1, "out"), ((7,), 0, "bias")]


def make(name: str, **settings: Any) -> Criterion:
    config = with_defaults(PruningConfig(criterion=name, **settings))
    return CRITERIA[name](config, seed=0)


def moment(step: int = 3, units: int = M, **values: Any) -> Moment:
    ones, zeros = torch.ones(units), torch.zeros(units)
    usual = {"live": ones.bool(), "similarity": zeros, "weight": ones, "cost": ones / M, "noise": ones / 2}
    usual |= {"kinds": zeros.long(), "summary": torch.tensor([[0.8, 0.1, 1.0], [0.0, 0.0, 0.0]])}
    return Moment(step=step, schedule=SCHEDULE, **{"expected": 0.9, **usual, **values})


def advance(criterion: Criterion, state: State, total: Tensor, now: Moment) -> State:
    """Take the units' numbers into the state in the ways that the criterion needs."""
    if criterion.needs & {"weight", "gram"}:
        state = criterion.weigh(state, total)
    return criterion.update(state, total, now) if criterion.needs & {"grad", "influence", "gate"} else state


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Return whole numbers, whose sums and products are exact in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def view(member: Member, weight: Tensor, grad: Tensor, start: int, count: int) -> ShardView:
    return ShardView(member, start, weight.flatten()[start : start + count], grad.flatten()[start : start + count])


# --- laws of all -----------------------------------------------------------------------------------------------------


def test_the_criteria_are_there() -> None:
    assert set(CRITERIA) >= {"magnitude", "random", "movement", "soft_movement", "sensitivity", "gum"}


@pytest.mark.parametrize("name", CRITERIA)
def test_no_setting_stays_open(name: str) -> None:
    config = with_defaults(PruningConfig(criterion=name))
    assert config.scope in ("global", "per_group")
    given = PruningConfig(criterion=name, scope="global", rounds=0, regularization=0.0, uniqueness=0.25)
    assert with_defaults(given) == given


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if criterion.kind == "neuron"])
def test_a_budget_lets_each_layer_rank_its_own(name: str) -> None:
    assert with_defaults(PruningConfig(criterion=name, budget="log")).scope == "per_group"


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--criterion sparsity is unknown; known are .*movement"):
        with_defaults(PruningConfig(criterion="sparsity"))


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize(("shape", "dim", "role"), MEMBERS)
@pytest.mark.parametrize("name", WITH_SHARE)
def test_shares_of_any_cut_add_up(name: str, shape: tuple[int, ...], dim: int, role: Role, world_size: int) -> None:
    criterion, member = make(name), Member(name="weight", shape=shape, dim=dim, role=role)
    weight, grad = whole_numbers(*shape), whole_numbers(*shape, seed=1)
    total = criterion.share(view(member, weight, grad, 0, weight.numel()))
    bounds = [shard_bounds(weight.numel(), rank, world_size) for rank in range(world_size)]
    shares = [criterion.share(view(member, weight, grad, *part)) for part in bounds]
    assert total.any()
    assert torch.equal(torch.stack(shares).sum(0), total)


def history(criterion: Criterion, state: State, units: slice) -> list[State]:
    """Update some of M units over a few steps, as their owner does."""
    states, masks, similar = [], torch.rand(5, M) < 0.7, torch.rand(5, M)
    for step, total in enumerate(torch.randn(5, M)):
        lines = {"live": masks[step], "similarity": similar[step], "weight": torch.full((M,), 0.1)}
        owned = {name: line[units] for name, line in lines.items()}
        now = moment(step + 1, units=len(total[units]), **owned)
        state = advance(criterion, state, total[units].square() + 1, now)
        states.append(state)
    return states


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize("name", CRITERIA)
def test_scores_do_not_depend_on_who_owns_the_units(name: str, world_size: int) -> None:
    criterion = make(name, uniqueness=2.0, regularization=3.0)

    def scores(layout: UnitLayout, rank: int) -> Tensor:
        state = criterion.initial_state(layout.owned_spans(rank), torch.device("cpu"))
        torch.manual_seed(0)
        return torch.stack([criterion.score(each) for each in history(criterion, state, layout.owned(rank))])

    alone = scores(UnitLayout(GROUPS, 1), 0)
    layout = UnitLayout(GROUPS, world_size)
    assert torch.equal(torch.cat([scores(layout, rank) for rank in range(world_size)], 1), alone)
    assert alone.dtype == torch.float32
    assert alone.isfinite().all()


@pytest.mark.parametrize("name", CRITERIA)
def test_updates_are_pure(name: str) -> None:
    criterion = make(name)
    state = criterion.initial_state(UnitLayout(GROUPS, 1).owned_spans(0), torch.device("cpu"))
    before = {key: value.clone() for key, value in state.items()}
    one = advance(criterion, state, torch.arange(M).float(), moment())
    other = advance(criterion, state, torch.arange(M).float(), moment())
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert one.keys() == state.keys()


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("scope", ["global", "per_group"])
@pytest.mark.parametrize("name", CHOOSING)
def test_at_the_target_exactly_the_target_remains(name: str, scope: str, multiple: int) -> None:
    criterion = make(name, scope=scope, width_multiple=multiple)
    scores = list(torch.randn(M, generator=torch.Generator().manual_seed(0)).split([g.num_units for g in GROUPS]))
    widths = [int(mask.sum()) for mask in criterion.select(scores, GROUPS, SCHEDULE, SCHEDULE.last_descent_step)]
    if multiple == 1:
        assert (sum(widths) == M // 2) if scope == "global" else (widths == [3, 6, 1, 2])
    else:
        assert abs(sum(widths) - M // 2) <= 1 if scope == "global" else widths == [4, 6, 2, 2]
        before = criterion.select(scores, GROUPS, SCHEDULE, SCHEDULE.last_descent_step - 1)
        assert any(int(mask.sum()) % 2 for mask in before), "widths are rounded only at the target"


@pytest.mark.parametrize("multiple", [8, 10])
@pytest.mark.parametrize("scope", ["global", "per_group"])
def test_what_rounds_leave_are_multiples(scope: str, multiple: int) -> None:
    criterion = make("magnitude", scope=scope, width_multiple=multiple, rounds=4)
    schedule = Schedule(total_steps=100, target=0.5, rounds=4)
    groups = [replace(group_of(f"{layer}", 100, layer), matrix_cost=100) for layer in range(3)]
    scores = [torch.randn(100, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    for step in schedule.removal_steps:
        masks = criterion.select(scores, groups, schedule, step)
        scores = [each[mask] for each, mask in zip(scores, masks, strict=True)]
        groups = [replace(group, num_units=len(each)) for group, each in zip(groups, scores, strict=True)]
    widths = [group.num_units for group in groups]
    assert not any(width % multiple for width in widths)
    assert abs(sum(widths) - 150) <= (multiple / 2 if scope == "global" else 3 * multiple / 2)


def test_random_takes_as_large_a_part_of_the_heads_as_of_the_neurons() -> None:
    criterion = make("random", scope="global", remaining=0.5)
    groups = [group_of("mlp", 4000, 0), replace(group_of("attention", 200, 0), kind="head", cost=40)]
    scores = [torch.rand(group.num_units, generator=torch.Generator().manual_seed(0)) for group in groups]
    heads = criterion.select(scores, groups, SCHEDULE, SCHEDULE.last_descent_step)[1]
    assert 0.4 < float(heads.float().mean()) < 0.6


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 5, 7])
def test_soft_movement_keeps_what_is_above_the_threshold_and_at_least_the_schedule(step: int) -> None:
    assert step < SCHEDULE.last_descent_step
    threshold = 0.1 * (1 - ((SCHEDULE.last_descent_step - step) / (SCHEDULE.last_descent_step - 2)) ** 3)
    edge = torch.tensor(threshold).logit()
    above, below = torch.full((7,), float(edge) + 0.01), torch.full((13,), float(edge) - 0.01)
    high, low = make("soft_movement").select([above, below], GROUPS[:2], SCHEDULE, step)
    assert high.all()
    assert low.nonzero().flatten().tolist() == list(range(int(SCHEDULE.remaining(step) * 13)))


def random_order(seed: int, world_size: int, groups: tuple[UnitGroup, ...] = GROUPS) -> Tensor:
    criterion = CRITERIA["random"](with_defaults(PruningConfig(criterion="random")), seed)
    layout = UnitLayout(groups, world_size)
    states = [criterion.initial_state(layout.owned_spans(rank), torch.device("cpu")) for rank in range(world_size)]
    return torch.cat([criterion.score(state) for state in states])


def test_random_order_depends_on_seed_and_group_alone() -> None:
    order = random_order(0, 1)
    state_before = torch.random.get_rng_state()
    for world_size in range(1, 8):
        torch.manual_seed(world_size)
        assert torch.equal(random_order(0, world_size), order)
    torch.random.set_rng_state(state_before)
    assert torch.equal(random_order(0, 2, GROUPS[1:]), order[GROUPS[0].num_units :])
    assert not torch.equal(random_order(1, 1), order)
    renamed = (replace(GROUPS[1], name="layers.9.mlp"),)
    assert not torch.equal(random_order(0, 1, renamed), random_order(0, 1, GROUPS[1:2]))


def test_random_order_is_an_order_of_every_group() -> None:
    for group, scores in zip(GROUPS, random_order(5, 3).split([g.num_units for g in GROUPS]), strict=True):
        torch.testing.assert_close(scores.sort().values, torch.arange(group.num_units) / group.num_units)


def test_magnitude_is_the_norm_of_all_weights_of_a_neuron() -> None:
    model = tiny_model("llama")
    groups = unit_groups(model)
    config = PruningConfig(criterion="magnitude", remaining=0.5, warmup_fraction=0.0)
    pruner = Pruner(InMemoryBackend(model, learning_rate=1e-9), groups, config, total_steps=2, seed=0)
    expected = []
    for layer in model.model.layers:
        mlp = layer.mlp
        weights = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], 1)
        expected.append(weights.detach().norm(dim=1))
    train(pruner.backend, pruner, token_blocks(VOCABULARY), 2)
    assert all(torch.allclose(found, norm, rtol=1e-5) for found, norm in zip(pruner.scores, expected, strict=True))


def test_sensitivity_is_the_mean_of_absolute_first_order_changes_while_live() -> None:
    criterion = make("sensitivity")
    totals = torch.randn(6, M, generator=torch.Generator().manual_seed(0))
    lives = torch.rand(6, M, generator=torch.Generator().manual_seed(1)) < 0.7
    lives[0] = True
    state = criterion.initial_state(UnitLayout(GROUPS, 1).owned_spans(0), torch.device("cpu"))
    for step, (total, live) in enumerate(zip(totals, lives, strict=True), 1):
        state = criterion.update(state, total, moment(step, live=live))
    expected = (totals.abs() * lives).sum(0) / lives.sum(0)
    torch.testing.assert_close(criterion.score(state), expected)


def test_sensitivity_counts_the_input_bias_but_no_other() -> None:
    model, ids = tiny_model("gpt_neo"), tokens()
    backend, groups = InMemoryBackend(model), unit_groups(model)
    pruner = Pruner(backend, groups, PruningConfig(criterion="sensitivity"), total_steps=5, seed=0)
    backend.backward(model(ids, labels=ids).loss)
    expected = []
    for group in groups:
        mlp: Any = model.get_submodule(group.name)
        fc, proj = mlp.c_fc, mlp.c_proj
        into = (fc.weight * fc.weight.grad).sum(1) + fc.bias * fc.bias.grad
        expected.append((into + (proj.weight * proj.weight.grad).sum(0)).detach().abs())
    pruner.after_backward()
    backend.step()
    pruner.after_step()
    found = pruner.scoring.criterion.score(pruner.scoring.state)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["wanda", "flap"])
def test_a_head_of_features_like_neurons_is_worth_about_as_much_a_parameter(name: str) -> None:
    criterion, block, width = make(name), 64, 768
    weight, activity = torch.randn(width, block), criterion.activity(torch.randn(512, block))
    neuron = Member(name="weight", shape=(width, block), dim=1, role="out")
    worth = []
    for member, cost in ((neuron, 2 * width), (replace(neuron, block=block), 4 * width * block)):
        total = criterion.share(view(member, weight, weight, 0, weight.numel()))
        state = dict.fromkeys(("activity", "tokens", "sum", "squares"), torch.zeros(())) | {"total": total}
        state = criterion.observe(state, activity if member is neuron else activity.sum(-1, keepdim=True))
        assert criterion.grows is not None
        worth.append(float(criterion.score(state).mean() / cost**criterion.grows))
    assert 0.4 < worth[1] / worth[0] < 2
