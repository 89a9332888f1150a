"""Gates: numbers that the units' activations are multiplied by, one a unit, anew before every step.

They belong to pruning, not to the model: plain tensors, no parameters, known whole by every rank. What a rank's
backward passes leave in their gradient is its share of every unit's number, M numbers a step, like any other share.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from scale_prune.core import UnitGroup
from scale_prune.models.embedding import Cluster
from scale_prune.models.factorized import FactorizedLinear

GATED = (FactorizedLinear, Cluster)
"""Modules that multiply by their gates themselves; others get them on what comes in."""


class Gate:
    """The gates of one group, while training and in evaluation; None leaves the activations as they are."""

    def __init__(self) -> None:
        self.training: Tensor | None = None
        self.evaluation: Callable[[], Tensor] | None = None
        self.open = False

    def __call__(self, module: nn.Module) -> Tensor | None:
        """Return the (N,) gates for a module in its present mode, None while all are open."""
        if self.open:
            return None
        if module.training:
            return self.training
        return None if self.evaluation is None else self.evaluation()


class Gates:
    """The gates of a model.

    Args:
        module: the model, before or after an engine is made around it.
        groups: the groups that are gated.
    """

    def __init__(self, module: nn.Module, groups: Sequence[UnitGroup]) -> None:
        self.sizes = [group.num_units for group in groups]
        self.gates = [Gate() for _ in groups]
        self.holders = [module.get_submodule(group.output) for group in groups]
        self.handles = [
            holder.register_forward_pre_hook(_multiplier(gate, group))
            for holder, gate, group in zip(self.holders, self.gates, groups, strict=True)
            if not isinstance(holder, GATED)
        ]
        for holder, gate in zip(self.holders, self.gates, strict=True):
            if isinstance(holder, GATED):
                holder.gate = gate

    def put_on(self, training: Tensor | None, evaluation: Callable[[], Tensor] | None) -> None:
        """Use these from now on: (M,) lines over all groups, or None for no gates.

        Those of evaluation are made when the first evaluation needs them.
        """
        parts = [None] * len(self.sizes) if training is None else training.detach().split(self.sizes)
        made = None if evaluation is None else cache(lambda: evaluation().detach().split(self.sizes))
        for index, (gate, part) in enumerate(zip(self.gates, parts, strict=True)):
            gate.training = None if part is None else part.clone().requires_grad_()
            gate.evaluation = None if made is None else partial(lambda made, index: made()[index], made, index)

    def gradient(self) -> Tensor | None:
        """Return this rank's (M,) gradient with respect to the training gates, None while there are none."""
        if any(gate.training is None for gate in self.gates):
            return None
        values: list[Any] = [gate.training for gate in self.gates]
        return torch.cat([torch.zeros_like(value) if value.grad is None else value.grad for value in values])

    @contextmanager
    def all_open(self) -> Iterator[None]:
        """Let the model compute in the body as if it had no gates."""
        for gate in self.gates:
            gate.open = True
        try:
            yield
        finally:
            for gate in self.gates:
                gate.open = False

    def train(self) -> None:
        """Let what the gates sit on use those of training, while the rest of the model may be in evaluation."""
        for holder in self.holders:
            holder.training = True

    def remove(self) -> None:
        """Leave the model without gates."""
        self.put_on(None, None)
        for handle in self.handles:
            handle.remove()
        for holder in self.holders:
            if isinstance(holder, GATED):
                holder.gate = None


def _multiplier(gate: Gate, group: UnitGroup) -> Any:
    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        values = gate(module)
        return None if values is None else (args[0] * group.by_feature(values).to(args[0].dtype), *args[1:])

    return multiply
