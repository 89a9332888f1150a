"""Scores: the criterion at work on the units that a rank owns, and the choice that follows from the scores of all."""

from collections.abc import Mapping

import torch
from torch import Tensor

from scale_prune.core import Member, Schedule, check_finite
from scale_prune.criteria import Criterion, Moment, learns_from_gradients
from scale_prune.pruning.gating import Gating
from scale_prune.pruning.influence import Influence
from scale_prune.pruning.unit_line import UnitLine


class Scoring:
    """The scores of a run.

    Args:
        line: the units.
        criterion: gives them their scores.
        schedule: how much remains at which step.
        gating: the gates that the criterion trains, if there are any.

    Attributes:
        state: the criterion's state of the owned units, (U,) tensors and scalars by name.
        scores: one (N,) float32 tensor a group, as of the last choice; the same on all ranks.
        learned: a step that was made, not skipped in fp16, is part of the state; before, all scores are alike.
        total: (U,) float32, the shares of the last step added up, or the gradients of its gates.
    """

    def __init__(self, line: UnitLine, criterion: Criterion, schedule: Schedule, gating: Gating | None) -> None:
        self.line, self.criterion, self.schedule, self.gating = line, criterion, schedule, gating
        self.forget()
        self.learned = False
        self.scores = line.by_group(line.per_unit(lambda group: 0.0))
        self.total = torch.zeros(line.num_owned, device=line.backend.device)
        watches = schedule.target < 1 and "influence" in criterion.needs
        self._influence = Influence(line, criterion.of_sequences) if watches else None
        weights = line.per_unit(lambda group: 1.0 / (len(line.groups) * group.num_units))
        self._weights = line.owned(weights).clone()

    def forget(self) -> None:
        """Begin anew with what the criterion remembers."""
        self.state = self.criterion.initial_state(self.line.spans, self.line.backend.device)

    def take_gradients(self) -> None:
        """Add up what the criterion makes of the step's gradients. A collective, 4 M bytes, if it needs them."""
        if "grad" in self.criterion.needs:
            self.total = self.line.totals(self._share)
        elif self._influence is not None:
            self.total = self._influence.totals()
        elif self.gating is not None:
            self.total = self.gating.totals()

    def update(self, step: int, live: Tensor, similarity: Tensor) -> None:
        """Bring the owned units' state to the step that was just made. No communication.

        Args:
            step: its number, from 1.
            live: (M,) bool, the units that remain.
            similarity: (U,) mean similarity of the owned units.
        """
        self.learned = True
        gated = range(self.schedule.warmup_steps + 1, self.schedule.last_pruning_step + 1)
        gates_were_on = self.gating is not None and step in gated
        if self.schedule.target < 1 and (learns_from_gradients(self.criterion) or gates_were_on):
            self.state = self.criterion.update(self.state, self.total, self.moment(step, live, similarity))

    def moment(self, step: int, live: Tensor, similarity: Tensor) -> Moment:
        """Return what an update is told beside the totals; for the arguments see `update`."""
        of_gates: dict[str, Tensor] = {}
        expected = self.gating.expected if self.gating is not None else None
        if self.gating is not None:
            of_gates = {"kinds": self.line.owned(self.gating.kinds), "summary": self.gating.summary}
        return Moment(
            step=step,
            schedule=self.schedule,
            live=self.line.owned(live),
            similarity=similarity,
            weight=self._weights,
            cost=self.line.owned(self.line.costs),
            noise=self.line.owned(self.gating.noise if self.gating is not None else self.line.costs),
            expected=self.schedule.initial if expected is None else expected,
            **of_gates,
        )

    def choose(self, step: int) -> list[Tensor]:
        """Return which units remain after `step`, one (N,) bool a group; all ranks rank the same scores. A collective.

        Raises:
            ValueError: as `rate`.
        """
        return self.criterion.select(self.rate(), self.line.groups, self.schedule, step)

    @torch.no_grad()
    def rate(self) -> list[Tensor]:
        """Bring the scores up to date, and return them. A collective, 4 M bytes, 8 M where they are made of weights.

        Raises:
            ValueError: scores are not finite; the message names the group.
        """
        if "weight" in self.criterion.needs and "grad" not in self.criterion.needs:
            self.state = self.criterion.weigh(self.state, self.line.totals(self._share))
        line = self.line.gather(self.criterion.score(self.state))
        self.scores = self.line.by_group(line)
        if not line.isfinite().all():
            for group, scores in zip(self.line.groups, self.scores, strict=True):
                check_finite(scores, group.name)
        return self.scores

    def take_ranks(self, ranked: Mapping[int, Tensor]) -> None:
        """Take in the (N,) scores of groups, by number, that this rank has ranked. A collective, 4 M bytes."""
        line = self.line.per_unit(lambda group: 0.0)
        for index, scores in ranked.items():
            line[self.line.layout.slice_of(index)] = scores
        self.state = self.criterion.weigh(self.state, self.line.add_up(line))

    def stop(self) -> None:
        """Leave the model without hooks."""
        if self._influence is not None:
            self._influence.remove()

    def _share(self, member: Member) -> Tensor | None:
        if member.role not in self.criterion.roles:
            return None
        return self.criterion.share(self.line.backend.master(member, grad="grad" in self.criterion.needs))
