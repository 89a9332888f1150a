"""How much remains at which step: the cubic schedule of gradual pruning.

Source: Zhu & Gupta 2017 (arXiv 1710.01878), in the form with warm-up and cool-down of the code of arXiv 2302.03773.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Map a step, 1 to `total_steps`, to the fraction of units that remains after it.

    Attributes:
        total_steps: optimizer steps of the run, at least 1.
        target: remaining fraction at the end, in (0, 1].
        warmup_fraction: fraction of the steps that stays dense, in [0, 1).
        cooldown_fraction: fraction of the steps that is spent at the target, in [0, 1).
        update_every: steps between two updates of the masks, at least 1.
        initial: remaining fraction at the start; above 1 where factors are larger than the matrices they stand for.
        settles: nothing is chosen anew once the target is reached.
        rounds: parts of the descent at whose ends units leave for good; 0 where they are masked until the end.
    """

    total_steps: int
    target: float
    warmup_fraction: float = 0.1
    cooldown_fraction: float = 0.3
    update_every: int = 1
    initial: float = 1.0
    settles: bool = False
    rounds: int = 0

    @property
    def warmup_steps(self) -> int:
        """Steps that stay dense."""
        return int(self.warmup_fraction * self.total_steps + 1e-9)

    @property
    def last_descent_step(self) -> int:
        """The step at which the target is reached; it comes after warm-up also where the fractions add up to 1."""
        return max(self.total_steps - int(self.cooldown_fraction * self.total_steps + 1e-9), self.warmup_steps + 1)

    @property
    def descent_steps(self) -> int:
        """Steps from the last dense one to the target."""
        return self.last_descent_step - self.warmup_steps

    @property
    def last_pruning_step(self) -> int:
        """The step after which units are removed no more, so that the model can be compacted."""
        at_target = (self.settles or self.rounds > 0) and self.target < 1
        return self.last_descent_step if at_target else self.total_steps

    @property
    def removal_steps(self) -> list[int]:
        """The steps after which units leave for good, the last pruning step at their end."""
        if not self.rounds or self.target == 1:
            return [self.last_pruning_step]
        parts = range(1, self.rounds + 1)
        return [self.warmup_steps + -(-self.descent_steps * part // self.rounds) for part in parts]

    def progress(self, step: int) -> float:
        """Return how far the descent is, from 0 (dense) to 1 (at the target), rising fast first: 1 - (1 - x)^3."""
        if step >= self.last_descent_step:
            return 1.0
        x = max(step - self.warmup_steps, 0) / self.descent_steps
        return 1.0 - (1.0 - x) ** 3

    def remaining(self, step: int) -> float:
        """Return the fraction of units that remains after `step`, in [target, initial]."""
        return self.initial + (self.target - self.initial) * self.progress(step)

    def updates(self, step: int) -> bool:
        """Tell whether the masks are chosen anew after `step`; the first step at the target and the last always do."""
        if self.target == 1.0 or self.rounds or not self.warmup_steps < step <= self.last_pruning_step:
            return False
        return step % self.update_every == 0 or step in (self.last_descent_step, self.last_pruning_step)

    def learning_rate(self, step: int) -> float:
        """Return the factor in [0, 1] on the scores' learning rate: linear rise over warm-up, then linear decay."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        return max(self.total_steps + 1 - step, 0) / (self.total_steps + 1 - self.warmup_steps)
