"""The life of a pruning run: shares, scores, masks, and the proof that the masks hold.

What moves between ranks, with M units in all, G groups and T sampled tokens:

    after_backward   reduce-scatter of the shares: each unit's total arrives at its owner      4 M bytes a step
    after_step       all-gather of the scores; every rank ranks them alike                     4 M bytes an update
                     reduce-scatter and all-gather of the read-back                            8 M bytes an update
                     all-gather of sampled activations, one group at a time                    T * N numbers a sample
                     or reduce-scatter of what the criterion makes of them                     4 M bytes a sample

The float32 master stays dense. A masked unit's gradient is exactly 0, so its master makes the optimizer's own steps on
a gradient of 0 and no others: what is left of its momentum, with Adam's usual betas over some 20 steps and in all at
most about 9 steps' worth, and weight decay, a factor of 1 - learning rate * decay a step. A unit that returns has the
weights that these have made of those it left with.

Parameters never move. A rank holds scores and their optimizer state of M / W units, masks of all (M bytes).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from scale_prune.config import PruningConfig
from scale_prune.core import Member, Similarity, UnitGroup, UnitLayout, check_finite, remaining_fraction
from scale_prune.criteria import CRITERIA, GatedCriterion, Moment, ShardView, schedule_of, with_defaults
from scale_prune.models import Gates
from scale_prune.pruning.activations import ActivationSampler
from scale_prune.pruning.backend import ShardBackend
from scale_prune.pruning.gating import Gating
from scale_prune.system import Seconds


class Pruner:
    """Prunes a model while it is trained: call `after_backward` and `after_step` in the training loop.

    Args:
        backend: where the parameters live.
        groups: the model's groups of units.
        config: settings of pruning.
        total_steps: optimizer steps of the run, at least 1.
        seed: seed of random scores and of the sampled tokens, at least 0.

    Attributes:
        pruning: False where everything remains; then the two calls only count steps.
        masks: one (N,) bool tensor a group, True = keep; the same on all ranks.
        widths: units that remain in each group.
        scores: one (N,) float32 tensor a group, as of the last update of the masks.
        step: optimizer steps made.
        state: the criterion's state of the owned units, (U,) tensors and scalars by name.
        similarity: (U,) float32, of the owned units.
        similarities: what computes it, one a span of owned units.
        churn: units whose mask changed in the last update.
        seconds: wall-clock time spent in "scoring", "similarity" and "masking" (host time on a GPU).

    Raises:
        ValueError: the criterion is unknown, or `min_kept` asks for more units than remain.
    """

    def __init__(
        self, backend: ShardBackend, groups: Sequence[UnitGroup], config: PruningConfig, *, total_steps: int, seed: int
    ) -> None:
        config = with_defaults(config)
        self.backend, self.groups, self.config, self.seed = backend, tuple(groups), config, seed
        self.criterion = CRITERIA[config.criterion](config, seed)
        initial = remaining_fraction(self.groups, [group.num_units for group in self.groups])
        self.schedule = schedule_of(config, total_steps, initial=initial)
        check_min_kept(self.groups, config)
        self.layout = UnitLayout(self.groups, backend.world_size)
        self.spans = self.layout.owned_spans(backend.rank)
        self.num_owned = sum(span.last - span.first for span in self.spans)
        self.masks = [torch.ones(group.num_units, dtype=torch.bool, device=backend.device) for group in groups]
        self.widths = [group.num_units for group in groups]
        self.scores: list[Tensor] = [torch.zeros(group.num_units, device=backend.device) for group in groups]
        self.state = self.criterion.initial_state(self.spans, backend.device)
        self.similarity = self._per_owned(lambda group: 0.0)
        self._weights = self._per_owned(lambda group: 1.0 / (len(self.groups) * group.num_units))
        self._costs = self._per_unit(lambda group: group.cost / sum(each.dense_cost for each in self.groups))
        self.similarities = [
            Similarity(s.group.num_units, s.first, s.last, kind=config.similarity, weight=config.similarity_weight)
            for s in self.spans
        ]
        self._sampler = ActivationSampler(backend, self.groups, config.similarity_tokens)
        self._total = torch.zeros(self.num_owned, device=backend.device)
        self._at_boundary = False
        self._steps_seen = backend.steps_made()
        self.pruning = config.remaining < 1
        self._sampling = False
        self.step = 0
        self.churn = 0
        self.seconds = Seconds()
        self.gating = self._make_gating()
        self.prepare_step()

    # --- the two calls -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_backward(self) -> None:
        """Take the units' shares of the step's gradient; call it between `engine.backward` and `engine.step`.

        Raises:
            ValueError: the engine has made a step since the last call of `after_step`.
        """
        self.check_steps("pruner.after_step()")
        self._at_boundary = self.backend.at_boundary()
        if not self._at_boundary or not self.pruning:
            return
        with self.seconds.measure("scoring"):
            if "grad" in self.criterion.needs:
                self._total = self._totals(self._criterion_share)
            elif self.gating is not None:
                self._total = self._gate_totals(self.gating)

    @torch.no_grad()
    def after_step(self) -> None:
        """Update scores, choose masks where the schedule says so, and put them on the working copy.

        Raises:
            ValueError: scores cannot be ranked; `after_backward` was not called before the engine's step, or the engine
                has made none.
            RuntimeError: the masks, read back from the working copy, are not what was asked.
        """
        missing = "pruner.after_step()" if self._at_boundary else "pruner.after_backward()"
        self.check_steps(missing, expected=int(self._at_boundary))
        if not self._at_boundary:
            return
        self._at_boundary = False
        self._steps_seen += 1
        self.step += 1
        if self.backend.step_applied():
            with self.seconds.measure("similarity"):
                self._take_sample()
            with self.seconds.measure("scoring"):
                self._update_state()
        if self.schedule.updates(self.step):
            with self.seconds.measure("scoring"):
                self._choose_masks()
            with self.seconds.measure("masking"):
                self.put_masks_on()
        else:
            with self.seconds.measure("masking"):
                self._apply_masks()
        self.prepare_step()

    def check_steps(self, missing: str, expected: int = 0) -> None:
        """See that no call of `after_backward` or `after_step` was left out.

        Args:
            missing: the call that was, where the engine has made more steps than expected.
            expected: optimizer steps that it should have made since the last call of `after_step`.

        Raises:
            ValueError: it has made another number of them.
        """
        made = self.backend.steps_made() - self._steps_seen
        if made == expected:
            return
        what = (
            f"engine has made {made} of its steps without {missing}" if made > expected else "engine has made no step"
        )
        raise ValueError(
            f"after the pruner's step {self.step} the {what}; in every pass call engine.backward(loss), "
            "pruner.after_backward(), engine.step(), pruner.after_step(), in this order, and in a loop that goes on "
            "scale_prune.load_state() after engine.load_checkpoint()"
        )

    @torch.no_grad()
    def prepare_step(self) -> None:
        """Put on what the coming step needs: gates, and hooks that catch activations. A collective with gates."""
        self._arm_sampler()
        if self.gating is not None:
            assert isinstance(self.criterion, GatedCriterion)
            with self.seconds.measure("scoring"):
                self.gating.draw(self._gather(self.criterion.parameter(self.state)), self.step)

    def _arm_sampler(self) -> None:
        """Catch activations in the coming step, if its turn has come."""
        due = self.step % self.config.similarity_every == 0 and self.step < self.schedule.total_steps
        self._sampling = due and self.pruning and bool({"activation", "activity"} & self.criterion.needs)
        self._sampler.disarm()
        if self._sampling:
            self._sampler.arm(self.seed, self.step)

    def put_masks_on(self) -> None:
        """Zero the removed units in the working copy and see that it holds; go on from the engine's step. A collective.

        Raises:
            RuntimeError: the masks, read back from the working copy, are not what was asked.
        """
        self._steps_seen = self.backend.steps_made()
        self._apply_masks()
        self._verify_masks()

    # --- what the run reports ------------------------------------------------------------------------------------

    @property
    def remaining(self) -> float:
        """The fraction that remains by the masks: of neurons, or of parameters where components are removed."""
        return remaining_fraction(self.groups, self.widths)

    def take_gates_off(self) -> dict[str, Tensor]:
        """Leave the model without gates; return the (N,) numbers that stood for good, by group, if there were any."""
        if self.gating is None:
            return {}
        self.gating.gates.remove()
        return self.gating.final()

    @property
    def masks_by_name(self) -> dict[str, Tensor]:
        """The masks by the names of their groups."""
        return {group.name: mask for group, mask in zip(self.groups, self.masks, strict=True)}

    def mean_similarity(self) -> float | None:
        """Return the mean similarity of the live units, None where the criterion does not use it. A collective."""
        if "activation" not in self.criterion.needs:
            return None
        return float(self._gather(self.similarity)[torch.cat(self.masks)].mean())

    # --- scores --------------------------------------------------------------------------------------------------

    def _totals(self, share: Callable[[Member], Tensor | None]) -> Tensor:
        """Add up the members' shares and return the (U,) totals of the units that this rank owns."""
        line = torch.zeros(self.layout.padded, dtype=torch.float64, device=self.backend.device)
        for index, group in enumerate(self.groups):
            for member in group.members:
                part = share(member)
                if part is not None:
                    line[self.layout.slice_of(index)] += part
        return self.backend.reduce_scatter(line.float())[: self.num_owned]

    def _gate_totals(self, gating: Gating) -> Tensor:
        """Return the (U,) gradients of the owned units' gates, averaged over the global batch."""
        gradient = gating.gradient()
        line = torch.zeros(self.layout.padded, device=self.backend.device)
        if gradient is not None:
            line[: self.layout.num_units] = gradient / (self.backend.world_size * self.backend.loss_scale)
        return self.backend.reduce_scatter(line)[: self.num_owned]

    def _criterion_share(self, member: Member) -> Tensor | None:
        if member.role not in self.criterion.roles:
            return None
        return self.criterion.share(self.backend.master(member, grad="grad" in self.criterion.needs))

    def _update_state(self) -> None:
        gated = range(self.schedule.warmup_steps + 1, self.schedule.last_pruning_step + 1)
        gates_were_on = self.gating is not None and self.step in gated
        if self.pruning and ("grad" in self.criterion.needs or gates_were_on):
            self.state = self.criterion.update(self.state, self._total, self._moment())

    def _moment(self) -> Moment:
        return Moment(
            step=self.step,
            schedule=self.schedule,
            live=self._owned(torch.cat(self.masks)),
            similarity=self.similarity,
            weight=self._weights,
            cost=self._owned(self._costs),
            noise=self._owned(self.gating.noise if self.gating is not None else self._costs),
            expected=self.gating.expected if self.gating is not None else self.schedule.initial,
        )

    def _owned(self, line: Tensor) -> Tensor:
        return line[self.layout.owned(self.backend.rank)]

    def _per_unit(self, value: Callable[[UnitGroup], float]) -> Tensor:
        return torch.cat([torch.full((group.num_units,), value(group)) for group in self.groups]).to(
            self.backend.device
        )

    def _make_gating(self) -> Gating | None:
        if not self.pruning or not isinstance(self.criterion, GatedCriterion):
            return None
        gates = Gates(self.backend.module, self.groups)
        return Gating(self.criterion, self.schedule, self.groups, gates, self._costs, self.seed)

    def _per_owned(self, value: Callable[[UnitGroup], float]) -> Tensor:
        values = [torch.full((span.last - span.first,), value(span.group)) for span in self.spans]
        return torch.cat([*values, torch.zeros(0)]).to(self.backend.device)

    # --- sampled activations -------------------------------------------------------------------------------------

    def _take_sample(self) -> None:
        if self._sampling and "activity" in self.criterion.needs:
            self.state = self.criterion.observe(self.state, self._activity())
        if self._sampling and "activation" in self.criterion.needs:
            self._update_similarity()

    def _activity(self) -> Tensor:
        """Add up over ranks what the criterion makes of the sample; return that of the owned units, (U,) or (K, U)."""
        parts = torch.cat([self.criterion.activity(rows) for rows in self._sampler.caught()], dim=-1)
        lines = pad(parts.float(), (0, self.layout.padded - self.layout.num_units))
        totals = [self.backend.reduce_scatter(line)[: self.num_owned] for line in lines.view(-1, self.layout.padded)]
        return torch.stack(totals).view(*lines.shape[:-1], self.num_owned)

    def _update_similarity(self) -> None:
        """Gather the sampled activations one group at a time; each rank computes the rows of the units it owns."""
        owned = {span.index: (span, rows) for span, rows in zip(self.spans, self.similarities, strict=True)}
        for index, activations in enumerate(self._sampler.take()):
            if index in owned and len(activations):
                span, rows = owned[index]
                self.similarity[span.place] = rows.update(activations, self.masks[index])

    # --- masks ---------------------------------------------------------------------------------------------------

    def _choose_masks(self) -> None:
        if "weight" in self.criterion.needs:
            self.state = self.criterion.weigh(self.state, self._totals(self._criterion_share))
        self.scores = self._by_group(self._gather(self.criterion.score(self.state)))
        for group, scores in zip(self.groups, self.scores, strict=True):
            check_finite(scores, group.name)
        masks = self.criterion.select(self.scores, self.groups, self.schedule, self.step)
        self.churn = sum(int((new != old).sum()) for new, old in zip(masks, self.masks, strict=True))
        self.masks = masks
        self.widths = [int(mask.sum()) for mask in masks]

    def _gather(self, owned: Tensor) -> Tensor:
        padding = owned.new_zeros(self.layout.per_rank - len(owned))
        return self.backend.all_gather(torch.cat([owned, padding]))[: self.layout.num_units]

    def _by_group(self, line: Tensor) -> list[Tensor]:
        return list(line.split([group.num_units for group in self.groups]))

    def _apply_masks(self) -> None:
        for group, mask, width in zip(self.groups, self.masks, self.widths, strict=True):
            if width < group.num_units:
                self.backend.mask_working_copy(group, mask)

    def _verify_masks(self) -> None:
        """Read the working copy back: exactly the masked units must be zero, apart from units whose master is zero.

        Raises:
            RuntimeError: they are not; the message names the group. The same on all ranks.
        """
        read = self._by_group(self._magnitudes(self.backend.working) == 0)
        if all(torch.equal(zero, ~mask) for zero, mask in zip(read, self.masks, strict=True)):
            return
        born_zero = self._by_group(self._magnitudes(lambda member: self.backend.master(member, grad=False)) == 0)
        for group, mask, zero, born in zip(self.groups, self.masks, read, born_zero, strict=True):
            if not torch.equal(zero, ~mask | born):
                raise RuntimeError(
                    f"step {self.step}: the masks of group {group.name} did not take hold in the working copy: of "
                    f"{group.num_units} units {int(zero.sum())} read back as zero, {int((~mask | born).sum())} should"
                )

    def _magnitudes(self, source: Callable[[Member], ShardView]) -> Tensor:
        """Return (M,) sums of absolute values by unit, on all ranks."""

        def share(member: Member) -> Tensor:
            view = source(member)
            return view.unit_sum(view.weight.abs())

        return self._gather(self._totals(share))


def check_min_kept(groups: Sequence[UnitGroup], config: PruningConfig) -> None:
    """Refuse a floor that the target cannot hold.

    Raises:
        ValueError: the groups' floors of `min_kept` units add up to more than the target keeps.
    """
    each = config.min_kept if config.scope == "global" else 1
    floors = [min(each, group.num_units) for group in groups]
    smallest, total = remaining_fraction(groups, floors), sum(group.num_units for group in groups)
    if smallest <= config.remaining:
        return
    if groups[0].kind == "component":
        raise ValueError(
            f"--remaining {config.remaining} cannot be reached: {each} of the components of each of the {len(groups)} "
            f"weights, the fewest by --min_kept and --scope, are {smallest:.6f} of their parameters together; give more"
        )
    if config.scope != "global":
        return
    raise ValueError(
        f"--min_kept {config.min_kept} keeps {sum(floors)} units in {len(groups)} layers, more than the "
        f"{int(config.remaining * total)} of {total} that --remaining {config.remaining} leaves; "
        f"at most --min_kept {int(config.remaining * total) // len(groups)} is possible"
    )
