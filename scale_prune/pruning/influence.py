"""How much the loss of each sequence depends on each unit: h * dL/dh, caught at the input of the output projections.

The gradients are those that the backward pass makes anyway; nothing is sampled, and nothing but (N,) sums is kept. A
sequence's loss counts as if it stood alone, so that neither ranks nor accumulation nor the batch's size matter.

Shape letters: B sequences of a forward pass, T tokens in each, N units of a group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scale_prune.pruning.activations import real_tokens
from scale_prune.pruning.unit_line import UnitLine


class Influence:
    """Sums of what the sequences of a step say of the units.

    Args:
        line: the units.
        of_sequences: (B, N) sums over tokens of h * dL/dh of each sequence to the (N,) numbers that add up.
    """

    def __init__(self, line: UnitLine, of_sequences: Callable[[Tensor], Tensor]) -> None:
        self.line, self._of_sequences = line, of_sequences
        self._sums = line.per_unit(lambda group: 0.0)
        self._rows = 0
        module = line.backend.module
        self._handles = [module.register_forward_pre_hook(self._begin_pass, with_kwargs=True)]
        for index, group in enumerate(line.groups):
            self._handles.append(module.get_submodule(group.output).register_forward_pre_hook(self._watcher(index)))

    def totals(self) -> Tensor:
        """Return the owned units' (U,) sums of the step over all ranks, and begin anew. A collective, 4 M bytes."""
        totals = self.line.add_up(self._sums)
        self._sums.zero_()
        return totals

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _begin_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._rows = len(real_tokens(args, kwargs))

    def _watcher(self, index: int) -> Any:
        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if not (torch.is_grad_enabled() and args[0].requires_grad):
                return args
            return (_Watched.apply(args[0], partial(self._take, index)), *args[1:])

        return watch

    def _take(self, index: int, h: Tensor, gradient: Tensor) -> None:
        products = (h.float() * gradient.float()).view(self._rows, -1, h.shape[-1])
        backend, group = self.line.backend, self.line.groups[index]
        alone = self._rows * backend.accumulation_steps / backend.loss_scale
        by_unit = products.sum(1).view(self._rows, group.num_units, group.block).sum(-1)
        self._sums[self.line.layout.slice_of(index)] += self._of_sequences(by_unit * alone)


class _Watched(torch.autograd.Function):
    """The identity, whose backward pass shows h and its gradient.

    What autograd saves is dropped and made again under activation checkpointing, which our own hold on it would
    hinder.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Return h."""
        ctx.save_for_backward(h)
        ctx.take = take
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Show h and its gradient, and pass the gradient on."""
        ctx.take(ctx.saved_tensors[0], gradient)
        return gradient, None
