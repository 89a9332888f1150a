"""What a criterion learns of the units' activations: in some steps a sample of tokens is caught and taken in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_prune.config import PruningConfig
from scale_prune.core import Similarity
from scale_prune.criteria import Criterion, State
from scale_prune.pruning.activations import ActivationSampler
from scale_prune.pruning.calibration import Calibration
from scale_prune.pruning.unit_line import UnitLine


class Observations:
    """The samples of a run: before a step whose turn it is `prepare` hangs up hooks, after it `take` uses the catch.

    Args:
        line: the units.
        criterion: says what it needs, and what it makes of a sample where that is "activity".
        config: how often is sampled and how much, and how similarity is kept.
        total_steps: optimizer steps of the run, at least 1.
        seed: seed of the sampled tokens, at least 0.

    Attributes:
        due: the coming step is sampled.
        similarity: (U,) float32, of the owned units; 0 before the first sample.
        similarities: what computes it, one a span of owned units.
    """

    def __init__(
        self, line: UnitLine, criterion: Criterion, config: PruningConfig, *, total_steps: int, seed: int
    ) -> None:
        self.line, self.criterion, self.config = line, criterion, config
        self.total_steps, self.seed = total_steps, seed
        self.similarity = torch.zeros(line.num_owned, device=line.backend.device)
        self.similarities = [
            Similarity(s.group.num_units, s.first, s.last, kind=config.similarity, weight=config.similarity_weight)
            for s in line.spans
        ]
        self._sampler = ActivationSampler(line.backend, line.groups, config.similarity_tokens)
        self.due = False

    def prepare(self, step: int) -> None:
        """Catch activations in the step after `step`, if its turn has come, or that of one that was skipped."""
        sampled = {"activation"} if self.config.rounds else {"activation", "activity"}
        wanted = self.config.remaining < 1 and bool(sampled & self.criterion.needs)
        turn = self.due or step % self.config.similarity_every == 0
        self.due = wanted and turn and step < self.total_steps
        self._sampler.disarm()
        if self.due:
            self._sampler.arm(self.seed, step)

    def stop(self) -> None:
        """Leave the model without hooks."""
        self._sampler.disarm()

    def take(self, state: State, masks: Sequence[Tensor]) -> State:
        """Take in what the step's sample says, if there is one. A collective.

        Args:
            state: the criterion's, of the owned units.
            masks: (N,) bool, one a group.

        Returns:
            The criterion's state after it; a masked unit's is what it was, since its activations are none of its own.
        """
        if self.due and "activity" in self.criterion.needs:
            caught = [self.criterion.activity(rows) for rows in self._sampler.caught()]
            observed, live = self.criterion.observe(state, self._added_up(caught)), self.line.owned(torch.cat([*masks]))
            state = {name: torch.where(live, new, state[name]) if new.dim() else new for name, new in observed.items()}
        if self.due and "activation" in self.criterion.needs:
            self._update_similarity(masks)
        self.due = False
        return state

    def take_calibration(self, state: State, calibration: Calibration) -> State:
        """Take in what the calibration text says, in the place of any that was seen before. A collective."""
        initial = self.criterion.initial_state(self.line.spans, self.line.backend.device)
        observed = self.criterion.observe(initial, self._added_up(calibration.activities))
        return state | {name: value for name, value in observed.items() if value is not initial.get(name)}

    def mean_similarity(self, live: Tensor) -> float | None:
        """Return the mean over the units of an (M,) bool line, None where it is not kept up to date. A collective."""
        if "activation" not in self.criterion.needs:
            return None
        return float(self.line.gather(self.similarity)[live].mean())

    def _added_up(self, activities: Sequence[Tensor]) -> Tensor:
        """Add up over ranks what was made of each group's tokens; return that of the owned units, (U,) or (K, U)."""
        parts = torch.cat([*activities], dim=-1).float()
        totals = [self.line.add_up(line) for line in parts.view(-1, parts.shape[-1])]
        return torch.stack(totals).view(*parts.shape[:-1], self.line.num_owned)

    def _update_similarity(self, masks: Sequence[Tensor]) -> None:
        """Gather the sampled activations of one group at a time on the ranks that own units of it."""
        owned = {span.index: (span, rows) for span, rows in zip(self.line.spans, self.similarities, strict=True)}
        for index, activations in enumerate(self._sampler.take(self.line.layout.owners)):
            if index in owned and len(activations):
                span, rows = owned[index]
                self.similarity[span.place] = rows.update(activations, masks[index])
