"""The life of a pruning run without DeepSpeed: counts, masks that hold, scores that do not depend on the ranks."""

import re
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from memory_backend import MASKING, Exchange, InMemoryBackend, run_ranks, steady_model, token_blocks, train, zeros
from models import LAYERS, VOCABULARY, WIDTH, prepared_units, tiny_model
from torch import Tensor

from scale_prune.config.settings import PruningConfig
from scale_prune.core.groups import Member, UnitGroup
from scale_prune.criteria import CRITERIA, Criterion, ShardView, unused
from scale_prune.models.layer_units import unit_groups
from scale_prune.pruning.pruner import READ_BACK_EVERY, Pruner

STEPS = 11
M = LAYERS * WIDTH
BLOCKS = token_blocks(VOCABULARY)
NEURONS = [name for name in MASKING if CRITERIA[name].kind == "neuron"]
BY_BUDGET = [name for name in NEURONS if name not in ("soft_movement", "neuron_l0")]  # also before the target
BY_GRADIENT = [name for name, criterion in CRITERIA.items() if "grad" in criterion.needs]


def config(criterion: str, **settings: Any) -> PruningConfig:
    usual = {"remaining": 0.4, "warmup_fraction": 0.2, "cooldown_fraction": 0.2, "similarity_every": 3}
    return PruningConfig(criterion=criterion, **usual | settings)


def start(
    criterion: str, *, model: Any = None, kind: type[InMemoryBackend] = InMemoryBackend, **settings: Any
) -> tuple[InMemoryBackend, Pruner]:
    module, wanted = model or steady_model("gpt_neo"), config(criterion, **settings)
    groups = prepared_units(module, wanted)
    backend = kind(module)
    return backend, Pruner(backend, groups, wanted, total_steps=STEPS, seed=0)


def in_working(backend: InMemoryBackend, groups: tuple[UnitGroup, ...]) -> Tensor:
    return torch.cat(zeros(lambda name: backend.parameters[name], groups))


def in_master(backend: InMemoryBackend, groups: tuple[UnitGroup, ...]) -> Tensor:
    return torch.cat(zeros(lambda name: backend.masters[name], groups))


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "dtype"), [("gpt_neo", torch.float32), ("llama", torch.bfloat16)])
@pytest.mark.parametrize("scope", ["global", "per_group"])
@pytest.mark.parametrize("criterion", NEURONS)
def test_after_every_step_exactly_the_masked_units_are_zero_and_the_master_is_dense(
    criterion: str, scope: str, model_type: str, dtype: torch.dtype
) -> None:
    model: Any = steady_model(model_type)
    backend, pruner = start(criterion, model=model.to(dtype), scope=scope, update_every=2)

    def check() -> None:
        assert torch.equal(in_working(backend, pruner.groups), ~torch.cat(pruner.masks))
        assert not in_master(backend, pruner.groups).any()
        assert [int(mask.sum()) for mask in pruner.masks] == pruner.widths
        if pruner.schedule.updates(pruner.step) and criterion in BY_BUDGET:
            kept = pruner.schedule.remaining(pruner.step)
            assert pruner.widths == [int(kept * WIDTH)] * LAYERS or scope == "global"
            assert sum(pruner.widths) == int(kept * M) or scope == "per_group"

    train(backend, pruner, BLOCKS, STEPS, after=check)
    assert pruner.step == STEPS
    assert pruner.widths == [6] * LAYERS or (scope == "global" and sum(pruner.widths) == 20)
    assert pruner.remaining == sum(pruner.widths) / M


def test_a_masked_unit_comes_back_with_its_weights() -> None:
    backend, pruner = start("magnitude", scope="per_group")
    train(backend, pruner, BLOCKS, 10)
    group, mask = pruner.groups[1], pruner.masks[1].clone()
    unit = int((~mask).nonzero()[0])
    for member in group.members:
        backend.masters[member.name].movedim(member.dim, 0)[unit] *= 100.0
    train(backend, pruner, BLOCKS, 1)
    assert pruner.masks[1][unit]
    assert pruner.masking.churn == 2
    for member in group.members:
        row = backend.parameters[member.name].detach().movedim(member.dim, 0)[unit]
        assert torch.equal(row, backend.masters[member.name].movedim(member.dim, 0)[unit])
        assert row.abs().min() > 0.0


@pytest.mark.parametrize("model_type", ["gpt_neo", "gptj", "gpt2", "llama", "gpt_neox", "opt"])
def test_masked_units_have_no_gradient_at_all(model_type: str) -> None:
    model = tiny_model(model_type)
    backend, pruner = start("movement", model=model, cooldown_fraction=0.5)
    train(backend, pruner, BLOCKS, STEPS)
    ids = BLOCKS.block(0)[None]
    backend.backward(model(input_ids=ids, labels=ids).loss)
    pruner.after_backward()
    masked = ~torch.cat(pruner.masks)
    without_gradient = torch.cat(zeros(lambda name: model.get_parameter(name).grad, pruner.groups))
    assert without_gradient[masked].all()
    assert not pruner.scoring.total[masked].any()
    assert pruner.scoring.total[~masked].any()


class Forgetful(InMemoryBackend):
    """Masks everything but one tensor."""

    forgotten = "transformer.h.1.mlp.c_fc.bias"

    def mask_working_copy(self, group: UnitGroup, mask: Tensor, *, anew: bool = False) -> None:
        """Mask, and put the forgotten tensor's values back."""
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        super().mask_working_copy(group, mask, anew=anew)
        self.parameters[self.forgotten].data.copy_(before[self.forgotten])


class Greedy(InMemoryBackend):
    """Masks one unit more than asked."""

    def mask_working_copy(self, group: UnitGroup, mask: Tensor, *, anew: bool = False) -> None:
        """Mask one of the live ones of the middle layer as well."""
        super().mask_working_copy(group, mask.logical_and(mask.cumsum(0) > (group.layer == 1)), anew=anew)


@pytest.mark.parametrize("name", ["c_fc.weight", "c_fc.bias", "c_proj.weight"])
def test_a_tensor_that_stays_unmasked_stops_the_run_and_names_the_group(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forgetful, "forgotten", f"transformer.h.1.mlp.{name}")
    backend, pruner = start("random", kind=Forgetful)
    message = (
        r"step 3: the masks of group transformer\.h\.1\.mlp did not take hold .* 17 units 0 read back .* \d+ should"
    )
    with pytest.raises(RuntimeError, match=message):
        train(backend, pruner, BLOCKS, STEPS)


def test_a_live_unit_that_is_zero_stops_the_run_too() -> None:
    backend, pruner = start("random", kind=Greedy)
    with pytest.raises(RuntimeError, match=r"group transformer\.h\.1\.mlp did not take hold"):
        train(backend, pruner, BLOCKS, STEPS)


class Counting(InMemoryBackend):
    """Counts how often units' numbers are added up over ranks."""

    sums = 0

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """Count, and add up."""
        self.sums += 1
        return super().reduce_scatter(values)


def test_masks_are_read_back_when_they_change_and_not_at_every_update() -> None:
    backend, pruner = start("flop", kind=Counting, cooldown_fraction=0.0)
    assert isinstance(backend, Counting)
    made: list[int] = []

    def count() -> None:
        made.append(backend.sums - sum(made))

    train(backend, pruner, BLOCKS, STEPS, after=count)
    # Shares at every step; before the target nothing leaves, so that there is nothing to read back.
    assert made == [1 + (step == STEPS or step % READ_BACK_EVERY == 0) for step in range(1, STEPS + 1)]


def test_units_that_are_zero_from_the_start_are_no_failure() -> None:
    model = steady_model("gpt_neo")
    group = unit_groups(model)[1]
    for member in group.members:
        model.get_parameter(member.name).data.movedim(member.dim, 0)[[2, 5]] = 0.0
    backend, pruner = start("magnitude", model=model, scope="per_group", remaining=0.9)
    train(backend, pruner, BLOCKS, STEPS)
    assert not pruner.masks[1][[2, 5]].any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_masked_units_master_moves_by_left_over_momentum_and_decay_alone(weight_decay: float) -> None:
    """AdamW's own steps on a gradient of 0; in all 9 steps' worth of momentum and the decay."""
    backend, pruner = start("random", cooldown_fraction=0.7)
    options: Any = backend.optimizer.param_groups[0]
    options["weight_decay"] = weight_decay
    rate, (fall, square_fall) = options["lr"], options["betas"]
    train(backend, pruner, BLOCKS, 4)

    def masked() -> Iterator[list[Tensor]]:
        for group, mask in zip(pruner.groups, pruner.masks, strict=True):
            for member in group.members:
                master = backend.masters[member.name]
                state = backend.optimizer.state[master]
                yield [each.movedim(member.dim, 0)[~mask] for each in (master, state["exp_avg"], state["exp_avg_sq"])]

    before = list(masked())
    train(backend, pruner, BLOCKS, STEPS - 4)
    for (weight, mean, square), (found, *_) in zip(before, masked(), strict=True):
        expected = weight
        for step in range(5, STEPS + 1):
            mean, square = fall * mean, square_fall * square
            size = (square / (1 - square_fall**step)).sqrt() + options["eps"]
            expected = expected * (1 - rate * weight_decay) - rate * mean / (1 - fall**step) / size
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        moved = (found - weight).abs().max()
        assert 0 < moved < 9 * rate + (STEPS - 4) * rate * weight_decay * weight.abs().max()


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_updated_with_the_similarity_of_their_own_step() -> None:
    backend, pruner = start("gum", similarity_every=1, score_optimizer="sgd")
    before = pruner.scoring.state
    train(backend, pruner, BLOCKS, 1)
    assert pruner.observations.similarity.any()
    moment = pruner.scoring.moment(1, pruner.masking.live, pruner.observations.similarity)
    expected = pruner.scoring.criterion.update(before, pruner.scoring.total, moment)
    assert torch.equal(pruner.scoring.state["score"], expected["score"])


@pytest.mark.parametrize("world_size", [2, 3, 6])
@pytest.mark.parametrize("criterion", MASKING)
def test_any_number_of_ranks_keeps_the_same_units(criterion: str, world_size: int) -> None:
    models = [steady_model("gpt_neo") for _ in range(world_size + 1)]

    def run(exchange: Exchange, rank: int) -> Pruner:
        settings, model = config(criterion, score_optimizer="sgd", score_learning_rate=1.0), models.pop()
        groups = prepared_units(model, settings)
        backend = InMemoryBackend(model, exchange=exchange, rank=rank)
        pruner = Pruner(backend, groups, settings, total_steps=STEPS, seed=0)
        train(backend, pruner, BLOCKS, STEPS)
        return pruner

    (alone,) = run_ranks(run, 1)
    several = run_ranks(run, world_size)
    assert 0 < alone.remaining < 1
    for pruner in several:
        assert all(torch.equal(mask, other) for mask, other in zip(pruner.masks, alone.masks, strict=True))
        # Adam makes a rounding of a gate's small gradient a step of its own.
        rtol = 1e-2 if criterion == "neuron_l0" else 1e-3
        torch.testing.assert_close(torch.cat(pruner.scores), torch.cat(alone.scores), rtol=rtol, atol=1e-5)
    assert sum(pruner.line.num_owned for pruner in several) == alone.line.num_owned


@pytest.mark.parametrize("criterion", ["flap", "wanda"])
def test_what_a_masked_unit_is_remembered_by_stays_as_it_was(criterion: str) -> None:
    backend, pruner = start(criterion, similarity_every=1)
    train(backend, pruner, BLOCKS, STEPS - 1)
    masked, before = ~pruner.masking.live, pruner.scoring.state
    assert masked.any()
    train(backend, pruner, BLOCKS, 1)
    for name in pruner.scoring.state.keys() - {"total"}:  # which is of the weights
        value = pruner.scoring.state[name]
        assert torch.equal(value[masked], before[name][masked])
        assert not torch.equal(value[~masked], before[name][~masked])


@pytest.mark.parametrize("criterion", ["gum", "flap"])
def test_a_sample_that_a_skipped_step_lost_is_taken_in_the_next(criterion: str) -> None:
    backend, pruner = start(criterion)
    backend.overflow = True
    train(backend, pruner, BLOCKS, 1)
    backend.overflow = False
    assert pruner.observations.due
    train(backend, pruner, BLOCKS, 1)
    seen = pruner.observations.similarity if criterion == "gum" else pruner.scoring.state["tokens"]
    assert seen.any()
    assert not pruner.observations.due


@pytest.mark.parametrize("criterion", MASKING)
def test_a_skipped_step_changes_no_score(criterion: str) -> None:
    backend, pruner = start(criterion, update_every=2, similarity_every=1)
    train(backend, pruner, BLOCKS, 4)
    state, similarity, masks = pruner.scoring.state, pruner.observations.similarity.clone(), pruner.masks
    before = {name: value.clone() for name, value in state.items()}
    backend.overflow = True
    train(backend, pruner, BLOCKS, 1)
    assert pruner.step == 5
    assert all(torch.equal(pruner.scoring.state[name], value) for name, value in before.items())
    assert torch.equal(pruner.observations.similarity, similarity)
    assert torch.equal(in_working(backend, pruner.groups), ~torch.cat(masks)), "the masks are on"
    backend.overflow = False
    train(backend, pruner, BLOCKS, 1)
    changed = any(not torch.equal(pruner.scoring.state[name], value) for name, value in before.items())
    assert changed == (criterion not in ("random", "factorize"))


@pytest.mark.parametrize("criterion", ["sensitivity", "fisher", "wanda", "flap", "movement", "gum", "magnitude"])
def test_nothing_is_masked_before_a_step_was_made(criterion: str) -> None:
    """As in fp16, whose first steps are skipped until the loss scale fits."""
    backend, pruner = start(criterion, warmup_fraction=0.0)
    backend.overflow = True
    train(backend, pruner, BLOCKS, STEPS // 2)
    assert all(mask.all() for mask in pruner.masks)
    backend.overflow = False
    train(backend, pruner, BLOCKS, 1)
    assert not all(mask.all() for mask in pruner.masks)
    backend, pruner = start(criterion)
    backend.overflow = True
    train(backend, pruner, BLOCKS, STEPS)
    assert pruner.remaining == pytest.approx(pruner.config.remaining, abs=0.05)


@pytest.mark.parametrize("update_every", [1, 2])
def test_units_return_in_a_step_that_was_skipped(update_every: int) -> None:
    """Where scores have moved since the masks were chosen, a skipped step may choose them anew."""
    backend, pruner = start("movement", update_every=update_every)
    train(backend, pruner, BLOCKS, 5)
    before = torch.cat(pruner.masks)
    pruner.scoring.state["score"].neg_()
    backend.overflow = True
    train(backend, pruner, BLOCKS, 1)
    after = torch.cat(pruner.masks)
    assert bool((after & ~before).any())
    assert torch.equal(in_working(backend, pruner.groups), ~after)


class Broken(InMemoryBackend):
    """Reads one gradient that is not finite; trains without it."""

    def master(self, member: Member, *, grad: bool) -> ShardView:
        """Put a NaN into the gradient of one neuron."""
        view = super().master(member, grad=grad)
        if view.grad is not None and member.name == "transformer.h.2.mlp.c_fc.weight":
            view.grad[5 * member.shape[1]] = torch.nan
        return view


@pytest.mark.parametrize("criterion", BY_GRADIENT)
def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_group(criterion: str) -> None:
    backend, pruner = start(criterion, kind=Broken)
    message = r"1 of 17 scores of group transformer\.h\.2\.mlp are not finite"
    with pytest.raises(ValueError, match=message):
        train(backend, pruner, BLOCKS, STEPS)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("criterion", MASKING)
def test_accumulated_passes_are_one_step(criterion: str, accumulation: int) -> None:
    scores = []
    for passes in (1, accumulation):
        model = steady_model("gpt_neo")
        backend = InMemoryBackend(model, accumulation_steps=passes)
        settings = config(criterion, score_optimizer="sgd")
        pruner = Pruner(backend, unit_groups(model), settings, total_steps=STEPS, seed=0)
        train(backend, pruner, BLOCKS, 5)
        assert pruner.step == 5
        scores.append(torch.cat(pruner.scores))
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("criterion", MASKING)
def test_where_everything_remains_nothing_is_done(criterion: str) -> None:
    backend, pruner = start(criterion, remaining=1.0)
    train(backend, pruner, BLOCKS, 3)
    plain = InMemoryBackend(steady_model("gpt_neo"))
    untouched = Pruner(plain, pruner.groups, config("random", remaining=1.0), total_steps=STEPS, seed=0)
    train(plain, untouched, BLOCKS, 3)
    assert all(torch.equal(backend.masters[name], master) for name, master in plain.masters.items())
    assert (pruner.step, pruner.remaining, pruner.pruning) == (3, 1.0, False)
    assert not any(module._forward_pre_hooks for module in backend.module.modules())


CHANGED: dict[str, Any] = {
    "score_learning_rate": 0.3,
    "score_optimizer": "sgd",
    "regularization": 7.0,
    "uniqueness": 30.0,
    "similarity": "running",
    "similarity_every": 2,
    "similarity_tokens": 5,
    "similarity_weight": 0.2,
    "min_kept": 6,
    "width_multiple": 4,
    "update_every": 4,
    "initial_rank": 3,
    "gate_learning_rate": 0.03,
    "lambda_learning_rate": 0.3,
    "target_warmup_fraction": 0.1,
    "initial_drop_rate": 0.3,
    "gate_range": "free",
    "gate_l1": 3.0,
}


@pytest.mark.parametrize("criterion", MASKING)
def test_a_criterion_is_changed_by_the_settings_that_it_declares_and_by_no_other(criterion: str) -> None:
    def outcome(**settings: Any) -> list[Tensor]:
        backend, pruner = start(criterion, **{"scope": "global", "similarity_every": 1, **settings})
        train(backend, pruner, BLOCKS, STEPS)
        return [*pruner.scoring.state.values(), *pruner.masks, *backend.masters.values()]

    def same(some: list[Tensor], others: list[Tensor]) -> bool:
        return all(map(torch.equal, some, others))

    usual, own = outcome(), CRITERIA[criterion].settings
    changed = CHANGED | ({} if criterion in NEURONS else {"min_kept": 2})
    assert same(outcome(**{name: value for name, value in changed.items() if name not in own}), usual)
    special = (own - Criterion.settings) & changed.keys()
    assert [name for name in special if same(outcome(**{name: changed[name]}), usual)] == []
    assert unused(config(criterion, **changed)).keys() >= changed.keys() - own


# --- what is refused and reported ------------------------------------------------------------------------------------


def test_a_floor_that_the_target_cannot_hold_is_refused() -> None:
    message = r"--min_kept 7 keeps 21 units in 3 layers, more than the 20 of 51 .* at most --min_kept 6 is possible"
    with pytest.raises(ValueError, match=message):
        start("gum", min_kept=7)
    start("gum", min_kept=6)
    start("random", min_kept=7)


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(ValueError, match="--criterion l2 is unknown"):
        start("l2")


def test_time_is_counted_by_part() -> None:
    backend, pruner = start("gum")
    train(backend, pruner, BLOCKS, STEPS)
    assert pruner.seconds.keys() == {"scoring", "similarity", "masking"}
    assert all(seconds > 0 for seconds in pruner.seconds.values())


def test_mean_similarity_is_over_live_units() -> None:
    backend, pruner = start("gum", similarity_every=1, uniqueness=0.0)
    assert start("movement")[1].observations.mean_similarity(pruner.masking.live) is None
    train(backend, pruner, BLOCKS, STEPS)
    found = pruner.observations.mean_similarity(pruner.masking.live)
    assert found is not None
    assert found == pytest.approx(float(pruner.observations.similarity[torch.cat(pruner.masks)].mean()))
    assert 0 < found < 1


LOOPS = {  # calls of a pass by their initials: after_backward, engine.step, after_step; and what is said of them
    ("es",): "engine has made 1 of its steps without pruner.after_backward()",
    ("be",): "engine has made 1 of its steps without pruner.after_step()",
    ("bse",): "the engine has made no step",
    ("ebs",): "engine has made 1 of its steps without pruner.after_step()",
    ("bes", "es"): "engine has made 1 of its steps without pruner.after_backward()",
    ("bes", "be"): "engine has made 1 of its steps without pruner.after_step()",
    ("bes", "bes", "e", "e"): "after the pruner's step 1 the engine has made 1 of its steps without",
    ("bes",): None,
    ("e", "bes"): None,  # at the boundary alone is enough
    ("be", "bes"): None,
}


@pytest.mark.parametrize("calls", LOOPS, ids=" ".join)
def test_a_call_that_a_loop_forgets_is_named(calls: tuple[str, ...]) -> None:
    backend, pruner = start("magnitude")
    backend.accumulation_steps, backend.steps = 2, 40  # the engine's own checkpoint is loaded
    pruner.put_masks_on()

    def loop() -> None:
        do = {"b": pruner.after_backward, "e": backend.step, "s": pruner.after_step}
        for index, number in zip(range(8), cycle(range(len(calls))), strict=False):
            ids = BLOCKS.block(index)[None]
            backend.backward(backend(input_ids=ids, labels=ids).loss)
            for call in calls[number]:
                do[call]()

    expected = LOOPS[calls]
    if expected is None:
        loop()
        assert pruner.step == 4
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        loop()
