"""Gates while training, without DeepSpeed: the same on all ranks, exact gradients, a budget that is met."""

from typing import Any

import pytest
import torch
from memory_backend import Exchange, InMemoryBackend, run_ranks, steady_model, token_blocks, train
from models import VOCABULARY, logits, prepared_units, tiny_model, tokens
from transformers import PreTrainedModel

from scale_prune.config.settings import PruningConfig
from scale_prune.core import hard_concrete
from scale_prune.core.groups import remaining_fraction
from scale_prune.criteria import CRITERIA, GatedCriterion
from scale_prune.criteria.flop import Flop
from scale_prune.data.batches import training_batches
from scale_prune.models import recompute_in_training
from scale_prune.models.gates import Gates
from scale_prune.pruning.pruner import Pruner

STEPS = 11
BLOCKS = token_blocks(VOCABULARY)
GATED = [
    name for name, criterion in CRITERIA.items() if issubclass(criterion, GatedCriterion) and not criterion.freezes
]
HARD = ["flop", "neuron_l0"]


def start(criterion: str, *, model: Any = None, steps: int = STEPS, accumulation: int = 1, **settings: Any) -> Pruner:
    usual: dict[str, Any] = {
        "remaining": 0.4,
        "warmup_fraction": 0.2,
        "cooldown_fraction": 0.2,
        "targets": "mlp,attention" if CRITERIA[criterion].kind == "component" else "mlp",
    }
    config = PruningConfig(criterion=criterion, **usual | settings)
    module = model or steady_model("gpt_neo")
    groups = prepared_units(module, config)
    backend = InMemoryBackend(module, accumulation_steps=accumulation, learning_rate=1e-3)
    return Pruner(backend, groups, config, total_steps=steps, seed=0)


def train_more(pruner: Pruner, steps: int) -> None:
    train(pruner.backend, pruner, BLOCKS, steps)


def logits_of(pruner: Pruner) -> torch.Tensor:
    assert isinstance(pruner.backend.module, PreTrainedModel)
    return logits(pruner.backend.module, tokens())


def gates_of(pruner: Pruner) -> torch.Tensor:
    assert pruner.gating is not None
    return torch.cat([gate.training.detach() for gate in pruner.gating.gates.gates if gate.training is not None])


def test_the_gated_criteria_are_there() -> None:
    assert set(GATED) == {"flop", "flop_agp", "neuron_l0"}


@pytest.mark.parametrize(("factors", "ordered"), [("svd", 1), ("random", 0)])
def test_gates_start_in_the_order_of_singular_values_where_there_are_any(factors: str, ordered: int) -> None:
    pruner = start("flop", factors=factors, initial_drop_rate=0.05)
    middle = hard_concrete.log_alpha_of(0.05)
    for log_alpha in pruner.scoring.state["log_alpha"].split([group.num_units for group in pruner.groups]):
        expected = middle + ordered * torch.linspace(2.0, -2.0, len(log_alpha))
        torch.testing.assert_close(log_alpha, expected, rtol=0, atol=0.06)
        assert log_alpha.unique().numel() == log_alpha.numel()
    neurons = start("neuron_l0", initial_drop_rate=0.05).scoring.state["log_alpha"]
    torch.testing.assert_close(neurons, torch.full_like(neurons, middle), rtol=0, atol=0.06)


@pytest.mark.parametrize("model_type", ["gpt_neo", "gpt2", "llama", "gpt_neox", "opt", "gptj"])
def test_factorized_is_dense_at_the_start(model_type: str) -> None:
    dense = tiny_model(model_type)
    expected = logits(dense, tokens())
    pruner = start("flop", model=tiny_model(model_type))
    torch.testing.assert_close(logits_of(pruner), expected, rtol=1e-4, atol=1e-4)
    assert all(group.kind == "component" for group in pruner.groups)
    assert pruner.remaining > 1, "factors of full rank are larger than what they stand for"


@pytest.mark.parametrize("gate_range", ["unit", "free"])
@pytest.mark.parametrize("criterion", HARD)
def test_gates_start_at_one_on_average(criterion: str, gate_range: str) -> None:
    pruner = start(criterion, warmup_fraction=0.0, factors="random", gate_range=gate_range)
    assert pruner.gating is not None
    assert isinstance(pruner.scoring.criterion, GatedCriterion)
    final = pruner.scoring.criterion.final_gates(pruner.gating.parameter)
    torch.testing.assert_close(final, torch.ones_like(final), rtol=0.01, atol=0.0)


def test_gates_of_an_svd_start_below_one_for_small_components_alone() -> None:
    pruner = start("flop", warmup_fraction=0.0)
    assert pruner.gating is not None
    for final in pruner.gating.final().values():
        assert ((final > 0.73) & (final < 1.08)).all()
        assert (final[: len(final) // 2] > 0.97).all()
    assert gates_of(pruner).std() > 0.01


@pytest.mark.parametrize("criterion", GATED)
def test_dense_steps_have_no_gates(criterion: str) -> None:
    pruner = start(criterion)
    for step in range(4):
        assert bool(len([g for g in pruner.gating.gates.gates if g.training is not None])) == (step >= 2)  # type: ignore[union-attr]
        train_more(pruner, 1)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("criterion", GATED)
def test_a_gates_gradient_is_that_of_the_weights_behind_it(criterion: str, accumulation: int) -> None:
    """z dL/dz of a unit is the sum of w dL/dw over the weights that read it."""
    pruner = start(criterion, warmup_fraction=0.0, accumulation=accumulation)
    backend: Any = pruner.backend
    gates = gates_of(pruner)
    backend.module.train()
    for index in range(accumulation):
        ids = BLOCKS.block(index)[None]
        backend.backward(backend(input_ids=ids, labels=ids, use_cache=False).loss)
        pruner.after_backward()
    by_weights = []
    for group in pruner.groups:
        out = next(member for member in group.members if member.role == "out")
        weight = backend.parameters[out.name]
        by_weights.append((weight * weight.grad).detach().movedim(out.dim, 0).sum(1))
    torch.testing.assert_close(gates * pruner.scoring.total, torch.cat(by_weights), rtol=1e-3, atol=1e-6)
    assert pruner.scoring.total.abs().max() > 1e-4


@pytest.mark.parametrize("criterion", GATED)
def test_a_gate_that_overflows_in_fp16_has_no_gradient(criterion: str) -> None:
    pruner = start(criterion, warmup_fraction=0.0)
    backend: Any = pruner.backend
    backend.loss_scale = 2.0
    backend.module.train()
    ids = BLOCKS.block(0)[None]
    loss = backend(input_ids=ids, labels=ids, use_cache=False).loss
    backend.backward(loss)
    gates: Any = pruner.gating
    next(gate for gate in gates.gates.gates if gate.training is not None).training.grad[0] = torch.inf
    pruner.after_backward()
    assert pruner.scoring.total[0] == 0
    assert pruner.scoring.total.isfinite().all()
    assert (pruner.scoring.total != 0).any()


class ExplicitGates:
    """Gates as the paper has them: in the loss and in its penalties, all of them trained by autograd.

    The penalty of hard gates is the Lagrangian l1 (S - T) + l2 (S - T)^2, which l1 and l2 climb; that of real ones is
    the weighted mean of |gate| over weights and components.
    """

    def __init__(self, pruner: Pruner, learning_rate: float) -> None:
        assert isinstance(pruner.scoring.criterion, GatedCriterion)
        self.pruner, self.criterion = pruner, pruner.scoring.criterion
        self.model = steady_model("gpt_neo")
        self.gates = Gates(self.model, prepared_units(self.model, pruner.config))
        self.parameter = self.criterion.parameter(pruner.scoring.state).clone().requires_grad_()
        self.multipliers = [torch.zeros((), requires_grad=True) for _ in range(2)]
        self.weights = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0)
        self.descent = torch.optim.Adam([self.parameter])
        self.ascent = torch.optim.Adam(self.multipliers, maximize=True)
        self.model.train()

    def penalty(self, step: int) -> torch.Tensor:
        schedule, config = self.pruner.schedule, self.pruner.config
        if not isinstance(self.criterion, Flop):
            means = [part.abs().mean() for part in self.parameter.split(self.gates.sizes)]
            return config.gate_l1 * torch.stack(means).mean()
        share = min(step / (config.target_warmup_fraction * schedule.total_steps), 1.0)
        wanted = schedule.initial + (schedule.target - schedule.initial) * share
        excess = wanted - (hard_concrete.open_probability(self.parameter) * self.pruner.line.costs).sum()
        return self.multipliers[0] * excess + self.multipliers[1] * excess**2

    def step(self, micro_batches: list[torch.Tensor], step: int, noise: torch.Tensor) -> None:
        line = self.criterion.training_gates(self.parameter, noise)
        for gate, part in zip(self.gates.gates, line.split(self.gates.sizes), strict=True):
            gate.training = part
        losses = [self.model(input_ids=ids, labels=ids, use_cache=False).loss for ids in micro_batches]
        (torch.stack(losses).mean() + self.penalty(step)).backward()
        rate, schedule = self.criterion.gate_rate(self.pruner.schedule), self.pruner.schedule
        if isinstance(self.criterion, Flop):
            self.ascent.param_groups[0]["lr"] = self.criterion.multipliers_rate(schedule)
            self.ascent.step()
        else:
            rate *= schedule.learning_rate(step)
        self.descent.param_groups[0]["lr"] = rate
        for optimizer in (self.descent, self.weights):
            optimizer.step()
        for optimizer in (self.descent, self.weights, self.ascent):
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("criterion", "gate_range"), [*((name, "unit") for name in GATED), *((name, "free") for name in HARD)]
)
def test_gates_equal_autograd_through_the_loss_and_its_penalties(
    criterion: str, gate_range: str, accumulation: int
) -> None:
    settings: dict[str, Any] = {"update_every": STEPS, "gate_l1": 0.3, "gate_range": gate_range}
    pruner = start(criterion, warmup_fraction=0.0, accumulation=accumulation, **settings)
    explicit = ExplicitGates(pruner, learning_rate=1e-3)
    micro_batches = training_batches(
        BLOCKS,
        batch_size=6,
        micro_batch_size=6 // accumulation,
        accumulation=accumulation,
        rank=0,
        world_size=1,
        seed=0,
    )
    assert pruner.gating is not None
    for step in range(1, pruner.schedule.last_descent_step):
        explicit.step(next(micro_batches), step, pruner.gating.noise)
        train_more(pruner, 1)
        found = explicit.criterion.parameter(pruner.scoring.state)
        torch.testing.assert_close(found, explicit.parameter.detach(), rtol=1e-3, atol=1e-3)
        if criterion in HARD:
            multipliers = torch.stack([pruner.scoring.state["l1"], pruner.scoring.state["l2"]])
            torch.testing.assert_close(multipliers, torch.stack(explicit.multipliers).detach(), rtol=1e-3, atol=1e-4)
    assert pruner.step == 8


@pytest.mark.parametrize("criterion", HARD)
def test_a_recomputed_forward_has_the_same_gates(criterion: str) -> None:
    def gradients(recompute: bool) -> tuple[float, list[torch.Tensor]]:
        pruner = start(criterion, warmup_fraction=0.0)
        model: Any = pruner.backend.module
        if recompute:
            recompute_in_training(model)
        model.train()
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        assert pruner.gating is not None
        gates = pruner.gating.gates.gradient()
        assert gates is not None
        return float(loss.detach()), [gates, *(parameter.grad for parameter in model.parameters())]

    (loss, once), (again, twice) = gradients(False), gradients(True)
    assert loss == pytest.approx(again, rel=1e-6)
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_all_ranks_and_a_later_run_draw_the_same_noise_and_every_step_another() -> None:
    def draws(exchange: Exchange, rank: int) -> list[torch.Tensor]:
        model = steady_model("gpt_neo")
        config = PruningConfig(criterion="neuron_l0", warmup_fraction=0.0)
        groups = prepared_units(model, config)
        pruner = Pruner(InMemoryBackend(model, exchange=exchange, rank=rank), groups, config, total_steps=5, seed=0)
        assert pruner.gating is not None
        found = [torch.stack([gates_of(pruner), pruner.gating.noise])]
        for _ in range(2):
            train_more(pruner, 1)
            found.append(torch.stack([gates_of(pruner), pruner.gating.noise]))
        return found

    ranks = [*run_ranks(draws, 2), *run_ranks(draws, 2)]
    for step in range(3):
        assert all(torch.equal(rank[step], ranks[0][step]) for rank in ranks)
    assert (ranks[0][0][1] != ranks[0][1][1]).any()


@pytest.mark.parametrize("criterion", HARD)
def test_the_lagrangian_reaches_its_target(criterion: str) -> None:
    pruner = start(
        criterion, steps=400, remaining=0.6, warmup_fraction=0.0, cooldown_fraction=0.0, target_warmup_fraction=0.5
    )
    assert pruner.gating is not None
    train_more(pruner, 399)
    assert pruner.gating.expected == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("remaining", [0.25, 0.4, 0.75])
@pytest.mark.parametrize("criterion", [*GATED, "factorize"])
def test_the_budget_is_met_to_a_unit(criterion: str, remaining: float) -> None:
    pruner = start(criterion, remaining=remaining, scope="global" if criterion in HARD else "per_group")
    train_more(pruner, STEPS)
    assert pruner.remaining <= remaining + 1e-9
    room = [group.cost for group in pruner.groups]
    dense = sum(group.dense_cost for group in pruner.groups)
    missing = (remaining - pruner.remaining) * dense
    assert missing < (max(room) if criterion in HARD else sum(room))


@pytest.mark.parametrize("criterion", HARD)
def test_once_the_target_is_reached_gates_are_what_will_be_exported(criterion: str) -> None:
    pruner = start(criterion)
    train_more(pruner, 9)
    first = gates_of(pruner)
    train_more(pruner, 1)
    assert torch.equal(gates_of(pruner), first)
    assert torch.equal(torch.cat(list(pruner.take_gates_off().values())), first)


def test_before_the_target_as_many_gates_are_closed_in_evaluation_as_on_average() -> None:
    pruner = start("neuron_l0", warmup_fraction=0.0)
    assert pruner.gating is not None
    assert isinstance(pruner.scoring.criterion, GatedCriterion)
    log_alpha = torch.linspace(-6.0, 6.0, 31)
    gates = pruner.scoring.criterion.test_time_gates(log_alpha)
    closed = round(31 - float(hard_concrete.open_probability(log_alpha).sum()))
    assert (gates == 0).nonzero().flatten().tolist() == list(range(closed))
    assert torch.equal(gates[closed:], pruner.scoring.criterion.final_gates(log_alpha)[closed:])


def test_remaining_counts_parameters() -> None:
    pruner = start("flop")
    widths = [1 + index for index, _ in enumerate(pruner.groups)]
    kept = sum(
        width * (group.members[0].shape[1] + group.members[1].shape[0])
        for width, group in zip(widths, pruner.groups, strict=True)
    )
    dense = sum(group.members[0].shape[1] * group.members[1].shape[0] for group in pruner.groups)
    assert remaining_fraction(pruner.groups, widths) == pytest.approx(kept / dense)


def test_a_criterion_of_components_wants_factorized_weights() -> None:
    from scale_prune.pruning.units import units_of

    with pytest.raises(ValueError, match=r"'flop' removes components, but no weight .* scale_prune\.prepare"):
        units_of(tiny_model("gpt_neo"), PruningConfig(criterion="flop"))


@pytest.mark.parametrize("criterion", ["flop", "flop_agp", "factorize"])
def test_a_fraction_below_one_component_a_weight_is_refused_with_the_smallest(criterion: str) -> None:
    with pytest.raises(ValueError, match=r"--remaining 0\.001 cannot be reached: .* are 0\.1\d+ of their parameters"):
        start(criterion, remaining=0.001)
