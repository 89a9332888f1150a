"""What a criterion is: the rule that gives each unit a score.

A criterion knows nothing of ranks. It turns a slice of a tensor into the slice's additive share of every unit's number,
and updates state for some units, whichever they are. A new criterion is a new file, in this folder or anywhere else
with `register_criterion`; it says only what distinguishes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from scale_prune.config import PruningConfig
from scale_prune.core import (
    Kind,
    Member,
    Role,
    Schedule,
    UnitGroup,
    UnitSpan,
    group_fractions,
    select,
    standardized,
    unit_sum,
)
from scale_prune.core.level_table import LevelTable, on_the_way

Need = Literal["weight", "grad", "influence", "activation", "activity", "gram", "output_grad", "gate"]
State = dict[str, Tensor]

OF_COMPONENTS = frozenset({"targets", "factors", "initial_rank", "embedding_clusters", "tie_embeddings"})
"""Settings of how weights are factorized."""


@dataclass(frozen=True)
class ShardView:
    """A rank's slice of one member, in float32.

    Attributes:
        member: the tensor it is a slice of.
        start: flat offset of the first element.
        weight: (S,) master values, unmasked.
        grad: (S,) gradient of the loss, averaged over the global batch and unscaled; None where it isn't needed.
    """

    member: Member
    start: int
    weight: Tensor
    grad: Tensor | None

    def unit_sum(self, values: Tensor) -> Tensor:
        """Return this slice's (N,) share of the sum by unit of (S,) `values`."""
        return unit_sum(values, self.start, self.member.unit_shape, self.member.unit_dim)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where the run is, and what is known of the units being updated; U of them, of one or more groups.

    Attributes:
        step: optimizer step that was just made, from 1.
        schedule: the run's schedule.
        live: (U,) bool, units that remain at present.
        similarity: (U,) mean similarity to the live units of the group, 0 before the first sample.
        weight: (U,) 1 / (number of groups * units of its group): the unit's part in a mean over groups and units.
        cost: (U,) what the unit counts, as a fraction of the dense model.
        noise: (U,) the noise of the gates of the step that was just made, uniform in (0, 1).
        expected: the remaining fraction that the gates of that step amounted to on average.
        kinds: (U,) int64, 1 for heads, 0 for everything else; where there are gates.
        summary: what the criterion has made of the parameters of all gates of that step.
    """

    step: int
    schedule: Schedule
    live: Tensor
    similarity: Tensor
    weight: Tensor
    cost: Tensor
    noise: Tensor
    expected: float
    kinds: Tensor | None = None
    summary: Tensor | None = None


@dataclass
class Layers:
    """What calibration text has said of the layers.

    Attributes:
        redundancy: of each group's layer in the dense model, the mean cosine between what goes in and what comes out;
            empty where no budget asks for it.
        table: what every group's levels lose, where the budget is measured.
        widths: of each group at the target, where they were searched for.
    """

    redundancy: Sequence[float] = ()
    table: LevelTable | None = None
    widths: Sequence[int] = ()


class Criterion:
    """A rule that gives each unit a score; the base of all criteria.

    Attributes:
        needs: what the shares are made of. "grad": they are taken after every backward pass and `update` runs every
            step. "weight" alone: only when masks are chosen. "influence": the same of what `of_sequences` makes
            of the activations' gradients, without shares. "activation": `Moment.similarity` is kept up to date.
            "activity": every `similarity_every` steps `activity` gets `similarity_tokens` tokens, before `update`; the
            calibration text instead, once a round, where units leave in rounds.
            "gram": units leave in rounds, and in each `rank_units` ranks a group by its Gram matrix. "output_grad"
            beside it: errors of the output are weighed by what the loss makes of them.
            "gate": there are no shares; units are multiplied by gates, and `update` gets the gradient of these.
        kind: what is removed: neurons, and heads where the user asks for them, or components of the weights that the
            run factorizes before it begins.
        roles: the members that have a share.
        defaults: values of the settings that have none of their own, where the user gives none; every criterion has a
            "scope".
        settings: the settings that change its result, beside the scope, the schedule and what remains.
        settles: what is removed once the target is reached stays the same.
        freezes: weights stay as they are until what is to leave has left.
        grows: the power of what a unit has by which its score grows, 1 for a sum over it; heads and neurons that are
            ranked together are compared without it. None: scores of heads and of neurons are no such numbers, and are
            not ranked together.
        apart: its `select` brings neurons and heads to the target each by themselves, so that floors are checked so.
        of_layers: what is known of the layers, for budgets.

    Args:
        config: settings of pruning, without None where `defaults` has a value.
        seed: the run's seed, at least 0.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    kind: ClassVar[Kind] = "neuron"
    roles: ClassVar[frozenset[Role]] = frozenset({"in", "out"})
    defaults: ClassVar[dict[str, Any]] = {"scope": "per_group"}
    settings: ClassVar[frozenset[str]] = frozenset({"targets", "min_kept", "width_multiple", "update_every"})
    settles: ClassVar[bool] = False
    freezes: ClassVar[bool] = False
    grows: ClassVar[float | None] = 1.0
    apart: ClassVar[bool] = False

    def __init__(self, config: PruningConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.of_layers = Layers()

    def share(self, view: ShardView) -> Tensor:
        """Return the slice's (N,) additive part of every unit's number."""
        raise AssertionError(f"{type(self).__name__} needs {set(self.needs)} but has no share")

    def of_sequences(self, influence: Tensor) -> Tensor:
        """Return what sequences add to every unit, (N,), where "influence" is needed.

        Args:
            influence: (B, N) float32, the sum over a sequence's tokens of h * dL/dh, L being its own mean loss; of
                sequences that differ in how many tokens they are to predict, times that number over the step's mean.
        """
        raise AssertionError(f"{type(self).__name__} needs {set(self.needs)} but has no of_sequences")

    def initial_state(self, spans: Sequence[UnitSpan], device: torch.device) -> State:
        """Return the state of the spans' units, (U,) tensors by name."""
        zeros = torch.zeros(sum(span.last - span.first for span in spans), device=device)
        return {"total": zeros} | ({"activity": zeros.clone()} if "activity" in self.needs else {})

    def activity(self, activations: Tensor) -> Tensor:
        """Return what tokens add to every unit, where "activity" is needed: (N,), or (K, N) for K numbers a unit.

        Args:
            activations: (T, N) float32, what the output projection of a group reads; a rank may have no tokens of it.
        """
        raise AssertionError(f"{type(self).__name__} needs {set(self.needs)} but has no activity")

    def observe(self, state: State, activity: Tensor) -> State:
        """Return the state after a step whose tokens were sampled; by default the samples add up. Pure.

        Of masked units it is not taken: their activations are none of their own.

        Args:
            state: (U,) tensors by name.
            activity: (U,) or (K, U) float32, added up over the tokens of all ranks.
        """
        return state | {"activity": state["activity"] + activity}

    def update(self, state: State, total: Tensor, moment: Moment) -> State:
        """Return the state after this step, where shares are made of gradients. Pure.

        Args:
            state: (U,) tensors by name.
            total: (U,) float32, the units' shares added up, or the gradient of their gates.
            moment: where the run is.
        """
        raise AssertionError(f"{type(self).__name__} needs {set(self.needs)} but has no update")

    def weigh(self, state: State, total: Tensor) -> State:
        """Return the state before masks are chosen, where shares are made of weights. Pure.

        Args:
            state: (U,) tensors by name.
            total: (U,) float32, the units' shares added up.
        """
        return state | {"total": total}

    def rank_units(self, gram: Tensor, weight: Tensor, block: int) -> Tensor:
        """Return (N,) float32 scores of one group, where "gram" is needed; they take the total's place.

        Args:
            gram: (F, F) float32, h^T h of what the output projection reads; F is N * block, or one more with a last
                feature of 1.
            weight: (D, N * block) float32, what reads it; where "output_grad" is needed, multiplied from the left by a
                root of the Gram matrix of the output's gradients, so that squared norms are errors of the loss.
            block: neighboring features that are one unit's: 1, of heads their size.
        """
        raise AssertionError(f"{type(self).__name__} needs {set(self.needs)} but has no rank_units")

    def score(self, state: State) -> Tensor:
        """Return (U,) float32 scores; higher = keep."""
        return state["total"]

    def select(
        self, scores: Sequence[Tensor], groups: Sequence[UnitGroup], schedule: Schedule, step: int
    ) -> list[Tensor]:
        """Choose the units that remain after `step`: one (N,) bool mask for each group's (N,) scores."""
        at_target, remaining = step >= schedule.last_descent_step, schedule.remaining(step)
        if self.config.scope == "standardized":
            scores = [standardized(group) for group in scores]
        elif self.grows is not None and {group.kind for group in groups} == {"neuron", "head"}:
            scores = [each / group.cost**self.grows for each, group in zip(scores, groups, strict=True)]
        # What leaves for good in a round does not come back to make up a multiple later.
        multiple = self.config.width_multiple if at_target or self.config.rounds else 1
        layers = [group.layer for group in groups]
        fractions = _fractions(self, groups, remaining)
        return select(
            scores,
            costs=[group.cost for group in groups],
            dense_costs=[group.dense_cost for group in groups],
            dense_sizes=[group.dense_cost // group.cost for group in groups] if self.kind == "neuron" else None,
            remaining=remaining,
            scope=str(self.config.scope),
            min_kept=self.config.min_kept,
            width_multiple=[1 if group.kind == "head" else multiple for group in groups],
            fractions=fractions,
            layers=layers if self.kind == "neuron" and self.of_layers.table is None else None,
        )

    def components(self, shape: tuple[int, int]) -> int:
        """Return how many components a (D_out, D_in) weight has at the start, where `kind` is "component"."""
        return min(self.config.initial_rank or min(shape), *shape)


def _fractions(criterion: Criterion, groups: Sequence[UnitGroup], remaining: float) -> list[float] | None:
    """Return what remains of each group under a budget, None where all lose alike."""
    table, found = criterion.of_layers.table, criterion.of_layers.widths
    if table is None:
        return group_fractions(
            criterion.config.budget,
            remaining,
            [group.layer for group in groups],
            criterion.of_layers.redundancy,
            [group.dense_cost for group in groups],
        )
    if found:
        dense = [kept[-1] for kept in table.kept]
        return on_the_way(found, dense, criterion.config.remaining, remaining)
    widths = table.widths(remaining, [group.num_units for group in groups])
    return [width * group.cost / group.dense_cost for width, group in zip(widths, groups, strict=True)]


def learns_from_gradients(criterion: Criterion | type[Criterion]) -> bool:
    """Tell whether a criterion's `update` runs after every backward pass."""
    return bool({"grad", "influence"} & criterion.needs)


def members_of_shares(criterion: Criterion | type[Criterion], groups: Iterable[UnitGroup]) -> list[Member]:
    """Return the members whose gradients a criterion makes shares of; none where it needs no gradients of weights."""
    roles = criterion.roles if "grad" in criterion.needs else ()
    return [member for group in groups for member in group.members if member.role in roles]


class GatedCriterion(Criterion, ABC):
    """A criterion whose units are multiplied by gates that it trains until the target is reached.

    Attributes:
        travel: how far the parameter of a gate can move while the target is approached, at the usual learning rate.
    """

    needs = frozenset({"gate"})
    settles = True
    travel: ClassVar[float]

    def gate_rate(self, schedule: Schedule) -> float:
        """Return the learning rate of the gates."""
        return self.config.gate_learning_rate or self.travel / schedule.descent_steps

    @abstractmethod
    def parameter(self, state: State) -> Tensor:
        """Return what the gates are made of, (U,)."""

    def score(self, state: State) -> Tensor:
        """Return what the gates are made of."""
        return self.parameter(state)

    def training_gates(self, parameter: Tensor, noise: Tensor) -> Tensor:
        """Return the (N,) gates of a training step; by default those of the end.

        Args:
            parameter: (N,).
            noise: (N,) uniform in (0, 1).
        """
        return self.final_gates(parameter)

    @abstractmethod
    def final_gates(self, parameter: Tensor) -> Tensor:
        """Return the (N,) gates that the units which remain are exported with."""

    def test_time_gates(self, parameter: Tensor) -> Tensor:
        """Return the (N,) gates of one group in an evaluation before the target is reached."""
        return self.final_gates(parameter)

    def expected_remaining(self, parameter: Tensor, cost: Tensor) -> float | None:
        """Return the mean remaining fraction, for (M,) parameters and costs of all units, None if masks decide it."""
        return None

    def summary(self, parameter: Tensor, cost: Tensor, kinds: Tensor, schedule: Schedule, step: int) -> Tensor:
        """Return what `update` is to know of all gates, for (M,) parameters, costs and kinds of all units.

        Args:
            parameter: what the gates are made of.
            cost: what units count.
            kinds: int64, 1 for heads, 0 for everything else.
            schedule: the run's.
            step: the step that these gates are for.
        """
        return cost.new_zeros(0)
