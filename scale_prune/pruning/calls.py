"""Sees that a loop makes both of a pruner's calls in every pass, by the steps that the engine has made meanwhile."""

from scale_prune.pruning.backend import ShardBackend


class Calls:
    """The calls that a loop has made.

    Args:
        backend: counts the engine's steps.
    """

    def __init__(self, backend: ShardBackend) -> None:
        self.backend = backend
        self._at_boundary = False
        self._steps_seen = backend.steps_made()

    def go_on(self) -> None:
        """Go on from the steps that the engine has made by now, as where it has loaded a checkpoint."""
        self._steps_seen = self.backend.steps_made()

    def after_backward(self, step: int) -> bool:
        """Take note of `after_backward`, after the pruner's step `step`; tell whether an optimizer step comes next.

        Raises:
            ValueError: the engine has made a step since the last call of `after_step`.
        """
        self.check(step, "pruner.after_step()")
        self._at_boundary = self.backend.at_boundary()
        return self._at_boundary

    def after_step(self, step: int) -> bool:
        """Take note of `after_step`, after the pruner's step `step`; tell whether an optimizer step was made.

        Raises:
            ValueError: `after_backward` was not called before the engine's step, or the engine has made none.
        """
        missing = "pruner.after_step()" if self._at_boundary else "pruner.after_backward()"
        self.check(step, missing, expected=int(self._at_boundary))
        made, self._at_boundary = self._at_boundary, False
        self._steps_seen += int(made)
        return made

    def check(self, step: int, missing: str, expected: int = 0) -> None:
        """See that no call was left out.

        Args:
            step: the pruner's last step.
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
            f"after the pruner's step {step} the {what}; in every pass call engine.backward(loss), "
            "pruner.after_backward(), engine.step(), pruner.after_step(), in this order, and in a loop that goes on "
            "scale_prune.load_state() after engine.load_checkpoint()"
        )
