"""Sampled activations of the units, caught at the input of the output projections.

Hooks exist only during the steps that sample; no other step pays for them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scale_prune.core.groups import UnitGroup


class ActivationSampler:
    """Keeps h of some non-padding tokens of every forward pass of one optimizer step.

    A forward pass that is recomputed in the backward pass (activation checkpointing) counts once, one without
    gradients (an evaluation) not at all. Padding is what the model's `attention_mask` argument says.

    Args:
        module: the model.
        groups: whose activations are wanted.
        tokens: tokens kept of one forward pass, at least 1.
    """

    def __init__(self, module: nn.Module, groups: Sequence[UnitGroup], tokens: int) -> None:
        self.module, self.groups, self.tokens = module, groups, tokens
        self._handles: list[RemovableHandle] = []
        self._caught: list[list[Tensor]] = []
        self._wanted: set[int] = set()
        self._chosen: Tensor | None = None
        self._padding: Tensor | None = None
        self._generator = torch.Generator()

    def arm(self, seed: int) -> None:
        """Catch the coming forward passes; `seed` decides which tokens."""
        self._generator.manual_seed(seed)
        self._caught = [[] for _ in self.groups]
        begin = self.module.register_forward_pre_hook(self._begin_pass, with_kwargs=True)
        self._handles = [begin]
        for index, group in enumerate(self.groups):
            output = self.module.get_submodule(group.output)
            self._handles.append(output.register_forward_pre_hook(self._catcher(index)))

    def take(self, passes: int) -> list[Tensor]:
        """Remove the hooks and return one (passes * tokens, N) tensor a group; places without a token are zeros."""
        self.disarm()
        caught, self._caught = self._caught, []
        return [_stack(sampled, passes * self.tokens) for sampled in caught]

    def disarm(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._padding = kwargs.get("attention_mask")
        self._chosen = None
        self._wanted = set(range(len(self.groups))) if torch.is_grad_enabled() else set()

    def _catcher(self, index: int) -> Any:
        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if index not in self._wanted:
                return
            self._wanted.remove(index)
            h = args[0].detach().flatten(0, -2)
            if self._chosen is None:
                self._chosen = self._choose(len(h)).to(h.device)
            self._caught[index].append(h[self._chosen])

        return catch

    def _choose(self, num_tokens: int) -> Tensor:
        order = torch.randperm(num_tokens, generator=self._generator)
        if self._padding is not None and self._padding.numel() == num_tokens:
            order = order[self._padding.flatten().bool().cpu()[order]]
        return order[: self.tokens]


def _stack(sampled: list[Tensor], length: int) -> Tensor:
    rows = torch.cat(sampled)
    return torch.cat([rows, rows.new_zeros(length - len(rows), rows.shape[1])])
