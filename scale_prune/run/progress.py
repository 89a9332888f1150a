"""How far a run has come, and where its time went."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from scale_prune.system import Seconds


class Progress:
    """What is counted from step to step, and kept in checkpoints.

    Attributes:
        step: optimizer steps made, recovery included.
        tokens: tokens learned from, over all ranks, without padding.
        step_seconds: wall-clock seconds of each step.
        stepping: of all steps that this process has made.
        resumed_at: steps after which the run has gone on from a checkpoint.
        seconds: wall-clock seconds by part of the work.
        history: of each evaluation of the student the step, the stage, what was measured, and what remained.
        received: bytes that this rank has received for pruning's sake in the steps that prune, by collective, and under
            "steps" how many these were.
        rounds: of each round in which units left for good, what remained and what it cost.
        repair: of masks at their end, where one was asked for: the loss with it and without, and whether it was taken.
    """

    def __init__(self) -> None:
        self.step = 0
        self.tokens = 0
        self.step_seconds: list[float] = []
        self.stepping = 0.0
        self.resumed_at: list[int] = []
        self.seconds = Seconds()
        self.received: Counter[str] = Counter()
        self.rounds: list[dict[str, Any]] = []
        self.repair: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self._started = time.monotonic()

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds since the start, those before a checkpoint included."""
        return time.monotonic() - self._started

    @property
    def received_bytes(self) -> dict[str, float]:
        """Bytes that this rank receives for pruning's sake in a step that prunes, a mean, by collective."""
        steps = self.received["steps"]
        return {name: total / steps for name, total in self.received.items() if name != "steps"} if steps else {}

    def count_step(self, tokens: int, seconds: float) -> None:
        """Take note of a step that was made."""
        self.step += 1
        self.tokens += tokens
        self.step_seconds.append(seconds)
        self.stepping += seconds

    def count_received(self, received: Mapping[str, int]) -> None:
        """Take note of what a step that prunes has received."""
        self.received.update(received)
        self.received["steps"] += 1

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the step."""
        return {
            "total_seconds": self.total_seconds,
            "seconds": dict(self.seconds),
            "tokens": self.tokens,
            "step_seconds": self.step_seconds,
            "resumed_at": self.resumed_at,
            "received": dict(self.received),
            "rounds": self.rounds,
            "repair": self.repair,
            "history": self.history,
        }

    def restore(self, step: int, state: Mapping[str, Any], *, tokens_per_step: int) -> None:
        """Take over what a checkpoint kept.

        Args:
            step: the checkpoint's.
            state: what `state` returned.
            tokens_per_step: of a checkpoint in which no tokens were counted yet.
        """
        self.step = step
        self.tokens = state.get("tokens", step * tokens_per_step)
        self.step_seconds = [*state.get("step_seconds", [])]
        self.resumed_at = [*state["resumed_at"], step]
        self.seconds.update(state["seconds"])
        self.received.update(state.get("received", {}))
        self.rounds = [*state.get("rounds", [])]
        self.repair = {**state.get("repair", {})}
        self.history = [*state.get("history", [])]
        self._started -= state["total_seconds"]
