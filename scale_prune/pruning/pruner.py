"""The life of a pruning run: shares, scores, masks, and the proof that the masks hold.

What moves between ranks, with M units in all, G groups and T sampled tokens:

    after_backward   reduce-scatter of the shares: each unit's total arrives at its owner      4 M bytes a step
    after_step       all-gather of the scores; every rank ranks them alike                     4 M bytes an update
                     reduce-scatter and all-gather of the read-back                            8 M bytes a changed mask
                     sampled activations to the owners of a group's units                      T * N numbers a group
                     or reduce-scatter of what the criterion makes of them                     4 M bytes a sample

The float32 master stays dense. A masked unit's gradient is exactly 0, so its master makes the optimizer's own steps on
a gradient of 0 and no others: what is left of its momentum, with Adam's usual betas over some 20 steps and in all at
most about 9 steps' worth, and weight decay, a factor of 1 - learning rate * decay a step. A unit that returns has the
weights that these have made of those it left with.

Parameters never move. A rank holds scores and their optimizer state of M / W units, masks of all (M bytes).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_prune.config import PruningConfig
from scale_prune.core import UnitGroup, remaining_fraction
from scale_prune.criteria import CRITERIA, GatedCriterion, schedule_of, with_defaults
from scale_prune.pruning.backend import ShardBackend
from scale_prune.pruning.calls import Calls
from scale_prune.pruning.gating import Gating
from scale_prune.pruning.masking import Masking
from scale_prune.pruning.observations import Observations
from scale_prune.pruning.reach import check_min_kept
from scale_prune.pruning.scoring import Scoring
from scale_prune.pruning.unit_line import UnitLine
from scale_prune.system import Seconds

READ_BACK_EVERY = 10
"""Steps after which masks are read back though they have not changed."""


class Pruner:
    """Prunes a model while it is trained: call `after_backward` and `after_step` in the training loop.

    Args:
        backend: where the parameters live.
        groups: the model's groups of units.
        config: settings of pruning.
        total_steps: optimizer steps of the run, at least 1.
        seed: seed of random scores and of the sampled tokens, at least 0.

    Attributes:
        step: optimizer steps made.
        schedule: how much remains after which of them.
        line: all units, and which of them this rank owns.
        gating: the gates of the units, if the criterion trains any.
        scoring: the criterion, its state and its scores.
        observations: what it learns of the units' activations.
        masking: which units remain.
        calls: those that the loop has made.
        seconds: wall-clock time spent in "scoring", "similarity" and "masking" (host time on a GPU).

    Raises:
        ValueError: the criterion is unknown, or `min_kept` asks for more units than remain.
    """

    def __init__(
        self, backend: ShardBackend, groups: Sequence[UnitGroup], config: PruningConfig, *, total_steps: int, seed: int
    ) -> None:
        self.backend, self.groups, self.config = backend, tuple(groups), with_defaults(config)
        criterion = CRITERIA[self.config.criterion](self.config, seed)
        # Neurons that have left in earlier rounds were there at the start.
        factorized = self.groups[0].kind == "component"
        initial = remaining_fraction(self.groups, [group.num_units for group in self.groups]) if factorized else 1.0
        self.schedule = schedule_of(self.config, total_steps, initial=initial)
        check_min_kept(self.groups, self.config)
        self.line = UnitLine(backend, self.groups)
        self.gating = None
        if self.pruning and isinstance(criterion, GatedCriterion):
            self.gating = Gating(self.line, criterion, self.schedule, seed)
        self.scoring = Scoring(self.line, criterion, self.schedule, self.gating)
        self.observations = Observations(self.line, criterion, self.config, total_steps=total_steps, seed=seed)
        self.masking = Masking(self.line)
        self.calls = Calls(backend)
        self.seconds = Seconds()
        self.step = 0
        self.prepare_step()

    # --- the two calls -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_backward(self) -> None:
        """Take the units' shares of the step's gradient; call it between `engine.backward` and `engine.step`.

        Raises:
            ValueError: the engine has made a step since the last call of `after_step`.
        """
        if self.calls.after_backward(self.step) and self.pruning:
            with self.seconds.measure("scoring"):
                self.scoring.take_gradients()

    @torch.no_grad()
    def after_step(self) -> None:
        """Update scores, choose masks where the schedule says so, and put them on the working copy.

        Raises:
            ValueError: scores cannot be ranked; `after_backward` was not called before the engine's step, or the engine
                has made none.
            RuntimeError: the masks, read back from the working copy, are not what was asked.
        """
        if not self.calls.after_step(self.step):
            return
        self.step += 1
        if self.backend.step_applied():
            with self.seconds.measure("similarity"):
                self.scoring.state = self.observations.take(self.scoring.state, self.masks)
            with self.seconds.measure("scoring"):
                self.scoring.update(self.step, self.masking.live, self.observations.similarity)
        is_last = self.step >= self.schedule.last_pruning_step
        if self.schedule.updates(self.step) and (self.scoring.learned or is_last):
            with self.seconds.measure("scoring"):
                self.masking.update(self.scoring.choose(self.step))
        if not self.scoring.criterion.freezes:  # there are no masters, and what leaves may have to be seen once more
            with self.seconds.measure("masking"):
                self.put_masks_on() if self._reads_back() else self.masking.apply()
        self.prepare_step()

    def _reads_back(self) -> bool:
        """Tell whether masks are read back after this step: when they change, at the last, and now and then between."""
        due = self.masking.churn or self.step % READ_BACK_EVERY == 0 or self.step == self.schedule.last_pruning_step
        return self.schedule.updates(self.step) and bool(due)

    @torch.no_grad()
    def prepare_step(self) -> None:
        """Put on what the coming step needs: gates, and hooks that catch activations. A collective with gates."""
        self.observations.prepare(self.step)
        if self.gating is not None:
            with self.seconds.measure("scoring"):
                self.gating.draw(self.scoring.state, self.step)

    def put_masks_on(self) -> None:
        """Zero the removed units in the working copy and see that it holds; go on from the engine's step. A collective.

        Raises:
            RuntimeError: the masks, read back from the working copy, are not what was asked.
        """
        self.calls.go_on()
        self.masking.apply()
        self.masking.verify(self.step)

    def take_gates_off(self) -> dict[str, Tensor]:
        """Leave the model without gates and hooks; return the gates that stood for good, (N,) by group, if any."""
        self.observations.stop()
        self.scoring.stop()
        return self.gating.take_off() if self.gating is not None else {}

    # --- what has come of it -------------------------------------------------------------------------------------

    @property
    def pruning(self) -> bool:
        """False where everything remains; then the two calls only count steps."""
        return self.config.remaining < 1

    @property
    def masks(self) -> list[Tensor]:
        """One (N,) bool tensor a group, True = keep; the same on all ranks."""
        return self.masking.masks

    @property
    def widths(self) -> list[int]:
        """Units that remain in each group."""
        return self.masking.widths

    @property
    def scores(self) -> list[Tensor]:
        """One (N,) float32 tensor a group, as of the last update of the masks; the same on all ranks."""
        return self.scoring.scores

    @property
    def remaining(self) -> float:
        """The fraction that remains by the masks: of neurons, or of parameters where components are removed."""
        return self.masking.remaining
