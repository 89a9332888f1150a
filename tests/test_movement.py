"""Movement and GUM: the scores that autograd through an explicit mask trains, and a penalty that tells duplicates."""

from typing import Any

import pytest
import torch
from memory_backend import InMemoryBackend, steady_model, token_blocks, train
from models import VOCABULARY, tiny_model, tokens
from torch import Tensor
from torch.func import functional_call

from scale_prune.config.settings import PruningConfig
from scale_prune.core.groups import UnitGroup, UnitLayout
from scale_prune.core.schedule import Schedule
from scale_prune.core.similarity import Similarity
from scale_prune.criteria import CRITERIA, Criterion, Moment, ShardView, State, with_defaults
from scale_prune.data.batches import training_batches
from scale_prune.models.layer_units import unit_groups
from scale_prune.pruning.pruner import Pruner

SCHEDULE = Schedule(total_steps=11, target=0.5, warmup_fraction=0.2, cooldown_fraction=0.3)
SIZES = (7, 13, 2, 5)


def make(name: str, **settings: Any) -> Criterion:
    return CRITERIA[name](with_defaults(PruningConfig(criterion=name, **settings)), seed=0)


def moment(step: int, **values: Tensor) -> Moment:
    ones = torch.ones(len(values["similarity"]))
    usual: dict[str, Any] = {"live": ones.bool(), "cost": ones, "noise": ones, "expected": 1.0}
    return Moment(step=step, schedule=SCHEDULE, **usual | values)


def groups_of(*sizes: int) -> list[UnitGroup]:
    return [
        UnitGroup(name=f"{layer}.mlp", layer=layer, num_units=size, members=(), output="")
        for layer, size in enumerate(sizes)
    ]


def initial_state(criterion: Criterion, *sizes: int) -> State:
    return criterion.initial_state(UnitLayout(groups_of(*sizes), 1).owned_spans(0), torch.device("cpu"))


@pytest.mark.parametrize("model_type", ["gpt_neo", "gpt2", "llama"])
def test_the_gate_on_activations_has_the_gradient_of_the_output_weights(model_type: str) -> None:
    model, ids = tiny_model(model_type), tokens()
    groups = unit_groups(model)
    inputs: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        inputs.append(args[0])

    for group in groups:
        model.get_submodule(group.output).register_forward_pre_hook(keep)
    model(ids, labels=ids).loss.backward()
    criterion = make("movement")
    for group, h in zip(groups, inputs, strict=True):
        (out,) = (member for member in group.members if member.role == "out")
        parameter = model.get_parameter(out.name)
        assert parameter.grad is not None
        assert h.grad is not None
        share = criterion.share(ShardView(out, 0, parameter.detach().flatten(), parameter.grad.flatten()))
        by_tokens = (h.detach() * h.grad).flatten(0, -2).sum(0)
        torch.testing.assert_close(share.float(), by_tokens, rtol=1e-3, atol=1e-6)


# --- movement against autograd through an explicit mask --------------------------------------------------------------


class ExplicitMask:
    """Movement pruning as the paper has it: a mask in the forward pass, scores and weights trained by autograd.

    M multiplies the rows of W1 and the columns of W2, and gets a gradient; the bias is masked without one.
    """

    def __init__(self, model_type: str, config: PruningConfig, schedule: Schedule, learning_rate: float) -> None:
        self.model = steady_model(model_type)
        self.groups, self.config, self.schedule = unit_groups(self.model), config, schedule
        self.criterion = CRITERIA[config.criterion](config, seed=0)
        self.weights = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0)
        self.masks = [torch.ones(group.num_units, requires_grad=True) for group in self.groups]
        self.scores = [torch.zeros(group.num_units, requires_grad=True) for group in self.groups]
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config.score_optimizer]
        self.optimizer = kind(self.scores, lr=config.score_learning_rate)

    def loss(self, ids: Tensor) -> Tensor:
        masked: dict[str, Tensor] = dict(self.model.named_parameters())
        for group, mask in zip(self.groups, self.masks, strict=True):
            for member in group.members:
                shape = [-1 if axis == member.dim else 1 for axis in range(len(member.shape))]
                gate = mask.detach() if member.role == "bias" else mask
                masked[member.name] = masked[member.name] * gate.view(shape)
        loss: Tensor = functional_call(self.model, masked, (ids,), {"labels": ids, "use_cache": False}).loss
        return loss

    def step(self, micro_batches: list[Tensor], step: int) -> None:
        for ids in micro_batches:
            (self.loss(ids) / len(micro_batches)).backward()
        strength = float(self.config.regularization or 0) * self.schedule.remaining(step) / self.schedule.target
        penalty = sum((score.sigmoid().mean() for score in self.scores), torch.zeros(())) / len(self.scores)
        (strength * penalty).backward()
        for mask, score in zip(self.masks, self.scores, strict=True):
            assert mask.grad is not None
            assert score.grad is not None
            score.grad += mask.grad
        for options in self.optimizer.param_groups:
            options["lr"] = self.config.score_learning_rate * self.schedule.learning_rate(step)
        self.optimizer.step()
        self.weights.step()
        for mask in [*self.masks, *self.scores, *self.model.parameters()]:
            mask.grad = None
        if self.schedule.updates(step):
            chosen = self.criterion.select([score.detach() for score in self.scores], self.groups, self.schedule, step)
            self.masks = [mask.float().requires_grad_() for mask in chosen]


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 1e-2), ("sgd", 0.5)])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gpt_neo", {"scope": "global"}),
        ("gpt2", {"scope": "per_group", "update_every": 2}),
        ("llama", {"scope": "global", "regularization": 2.0}),
    ],
)
def test_movement_equals_autograd_through_an_explicit_mask(
    model_type: str, settings: dict[str, Any], accumulation: int, optimizer: str, rate: float
) -> None:
    usual: dict[str, Any] = {"remaining": 0.4, "warmup_fraction": 0.2, "cooldown_fraction": 0.2}
    scoring = {"score_optimizer": optimizer, "score_learning_rate": rate}
    config = with_defaults(PruningConfig(criterion="movement", **usual | scoring | settings))
    model, steps = steady_model(model_type), 12
    backend = InMemoryBackend(model, learning_rate=3e-3, accumulation_steps=accumulation)
    pruner = Pruner(backend, unit_groups(model), config, total_steps=steps, seed=0)
    explicit = ExplicitMask(model_type, config, pruner.schedule, learning_rate=3e-3)
    blocks, returned = token_blocks(VOCABULARY), 0
    batches = training_batches(
        blocks,
        batch_size=6,
        micro_batch_size=6 // accumulation,
        accumulation=accumulation,
        rank=0,
        world_size=1,
        seed=0,
    )
    for step, micro_batches in zip(range(1, steps + 1), batches, strict=False):
        before = torch.cat(pruner.masks)
        train(backend, pruner, blocks, 1)
        explicit.step(micro_batches, step)
        returned += int((torch.cat(pruner.masks) & ~before).sum())
        found = pruner.scoring.criterion.score(pruner.scoring.state)
        atol = 2e-5 * float(found.abs().max())
        torch.testing.assert_close(found, torch.cat(explicit.scores).detach(), rtol=2e-3, atol=atol)
        assert all(torch.equal(mask, one > 0) for mask, one in zip(pruner.masks, explicit.masks, strict=True))
    assert returned > 0 or optimizer == "sgd"  # masks change in both directions
    for name, parameter in explicit.model.named_parameters():
        torch.testing.assert_close(backend.masters[name], parameter.detach(), rtol=1e-3, atol=1e-4)


# --- GUM -------------------------------------------------------------------------------------------------------------


def gum_steps(activations: Tensor, *, uniqueness: float, removals: int) -> list[int]:
    """Let the penalty alone decide, one neuron a step, and return those that are left."""
    units = activations.shape[1]
    criterion = make("gum", uniqueness=uniqueness, regularization=10.0, score_optimizer="sgd")
    state = initial_state(criterion, units)
    live, similarity = torch.ones(units, dtype=torch.bool), Similarity(units, 0, units, kind="batch", weight=1.0)
    for kept in range(units - 1, units - 1 - removals, -1):
        alike = similarity.update(activations, live)
        now = moment(3, live=live, similarity=alike, weight=torch.full((units,), 1 / units))
        state = criterion.update(state, torch.zeros(units), now)
        plan = Schedule(total_steps=1, target=kept / units, warmup_fraction=0.0, cooldown_fraction=0.9)
        (live,) = criterion.select([criterion.score(state)], groups_of(units), plan, 1)
    left: list[int] = live.nonzero().flatten().tolist()
    return left


def test_of_duplicated_neurons_one_goes_before_any_other() -> None:
    single = torch.eye(11)[:, :7]
    doubled = single[:, [0, 1, 2, 3, 4, 5, 6, 2, 0, 5]]
    left = gum_steps(doubled, uniqueness=50.0, removals=3)
    assert sorted(doubled[:, left].argmax(0).tolist()) == list(range(7))


def test_without_uniqueness_the_penalty_cannot_tell_duplicates() -> None:
    assert gum_steps(torch.eye(11)[:, [0, 0, 1, 2, 3]], uniqueness=0.0, removals=2) == [0, 1, 2]


def test_with_the_gradient_equal_those_that_are_alike_go_first() -> None:
    h = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    h[:, 3:7] = h[:, :1] + 0.3 * h[:, 3:7]
    left = gum_steps(h, uniqueness=50.0, removals=4)
    assert len({0, 3, 4, 5, 6} & set(left)) == 1


@pytest.mark.parametrize("given", [0.0, 2.0])
@pytest.mark.parametrize("name", ["movement", "soft_movement", "gum"])
def test_the_score_penalty_is_the_derivative_of_the_regulariser(name: str, given: float) -> None:
    scores = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0)).requires_grad_()
    similar = torch.rand(sum(SIZES), generator=torch.Generator().manual_seed(1))
    weights = torch.cat([torch.full((size,), 1 / (len(SIZES) * size)) for size in SIZES])
    parts = [
        (score.sigmoid() * (1 + given * alike)).mean()
        for score, alike in zip(scores.split(SIZES), similar.split(SIZES), strict=True)
    ]
    step = 5
    rising = name == "soft_movement"
    schedule = SCHEDULE.progress(step) if rising else SCHEDULE.remaining(step) / SCHEDULE.target
    (3.0 * schedule * torch.stack(parts).mean()).backward()
    assert scores.grad is not None
    criterion = make(name, regularization=3.0, uniqueness=given, score_optimizer="sgd", score_learning_rate=1.0)
    state = initial_state(criterion, *SIZES)
    now = moment(step, similarity=similar, weight=weights)
    after = criterion.update(state | {"score": scores.detach()}, torch.zeros(len(scores)), now)
    moved = (criterion.score(after) - scores.detach()) / SCHEDULE.learning_rate(step)
    torch.testing.assert_close(moved, -scores.grad, rtol=1e-4, atol=1e-7)
