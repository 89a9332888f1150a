"""Sampled activations of the units, caught at the input of the output projections.

Hooks exist only during the steps that sample; no other step pays for them.

Which tokens are sampled follows from the seed, the step and their place in the global batch alone: neither the number
of ranks nor the accumulation steps change it. Every row of the global batch has its part of the sample, and within a
row every token that is no padding has the same chance.

Shape letters: B rows of a forward pass, T tokens in a row, N units of a group. A head's features are taken as if each
were of a token of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from scale_prune.core import UnitGroup
from scale_prune.pruning.backend import ShardBackend


class ActivationSampler:
    """Keeps h of some non-padding tokens of the forward passes of one optimizer step.

    A forward pass that is recomputed in the backward pass (activation checkpointing) counts once, one without
    gradients (an evaluation) not at all. Padding is what the model's `attention_mask` argument says.

    Args:
        backend: the model, and this rank's place among the others.
        groups: whose activations are wanted.
        tokens: tokens kept of one step, over all ranks; fewer where rows are too short for their part. None for all.
    """

    def __init__(self, backend: ShardBackend, groups: Sequence[UnitGroup], tokens: int | None) -> None:
        self.backend, self.groups, self.tokens = backend, tuple(groups), tokens
        self._handles: list[RemovableHandle] = []
        self._caught: list[list[Tensor]] = []
        self._wanted: set[int] = set()
        self._chosen: Tensor | None = None
        self._real = torch.empty(0)
        self._pass = 0
        self._seed: tuple[int, int] = (0, 0)

    def arm(self, seed: int, step: int) -> None:
        """Catch the coming forward passes; `seed` and `step`, both at least 0, decide which tokens."""
        self._seed, self._pass = (seed, step), 0
        self._caught = [[] for _ in self.groups]
        module = self.backend.module
        self._handles = [module.register_forward_pre_hook(self._begin_pass, with_kwargs=True)]
        for index, group in enumerate(self.groups):
            output = module.get_submodule(group.output)
            self._handles.append(output.register_forward_pre_hook(self._catcher(index)))

    def caught(self) -> Iterator[Tensor]:
        """Yield what this rank has caught so far, one (T, N) float32 tensor a group; T may be 0."""
        for group, rows in zip(self.groups, self._caught, strict=True):
            empty = torch.empty(0, group.num_features, device=self.backend.device)
            yield by_unit(torch.cat(rows).float() if rows else empty, group)

    def take(self, takers: Callable[[int], Sequence[int]] | None = None) -> Iterator[Tensor]:
        """Remove the hooks; bring the ranks' tokens together, one (tokens, N) tensor a group. A collective.

        A rank receives 8 bytes a group and rank, then T * N activations of each group that it takes.

        Args:
            takers: the ranks that get the tokens of a group, by its number; None for all ranks. The others get none.
        """
        caught = self._caught
        self.disarm()
        counts = torch.tensor([sum(map(len, rows)) for rows in caught], device=self.backend.device)
        # Ranks may differ by a token or more; where layers are dropped by chance, groups do so too.
        most = self.backend.all_gather(counts).view(-1, len(caught)).amax(0).tolist()
        like = next((rows[0] for rows in caught if rows), torch.empty(0, device=self.backend.device))
        for index, (group, parts, length) in enumerate(zip(self.groups, caught, most, strict=True)):
            rows = torch.cat([like.new_empty(0, group.num_features), *parts])
            padded = pad(rows, (0, 0, 0, length - len(rows)))
            if takers is None and length:
                rows = self.backend.all_gather(padded)
            elif takers is not None and length:
                rows = torch.cat([self.backend.gather_on(padded, rank) for rank in takers(index)])
            yield by_unit(rows, group)

    def disarm(self) -> None:
        """Remove the hooks, and forget what they caught."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._caught = [], []

    def _begin_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._wanted = set()
        if torch.is_grad_enabled() and self._pass < self.backend.accumulation_steps:
            self._wanted, self._chosen, self._real = set(range(len(self.groups))), None, real_tokens(args, kwargs)
            self._pass += 1

    def _catcher(self, index: int) -> Any:
        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if index not in self._wanted:
                return
            self._wanted.remove(index)
            h = rearrange(args[0].detach(), "... unit -> (...) unit")  # OPT joins rows and tokens itself
            if self._chosen is None:
                self._chosen = self._choose().to(h.device)
            self._caught[index].append(h[self._chosen])

        return catch

    def _choose(self) -> Tensor:
        """Return the places, among the B * T of this pass, of the tokens that are sampled."""
        in_pass, length = self._real.shape
        if self.tokens is None:
            return self._real.flatten().nonzero().flatten()
        total_rows = self.backend.accumulation_steps * self.backend.world_size * in_pass
        # As `batches.assigned` hands rows out: passes first, then ranks, then the rows of a pass.
        first_row = ((self._pass - 1) * self.backend.world_size + self.backend.rank) * in_pass
        turns = np.random.default_rng(self._seed).permutation(total_rows)
        chosen = []
        for row, real in enumerate(self._real):
            places = real.nonzero().flatten().numpy()
            quota = (self.tokens + total_rows - 1 - turns[first_row + row]) // total_rows
            order = np.random.default_rng((*self._seed, first_row + row)).permutation(places)
            chosen.append(torch.from_numpy(row * length + order[:quota]))
        return torch.cat(chosen)


def by_unit(activations: Tensor, group: UnitGroup) -> Tensor:
    """Return (T * block, N) of the (T, N * block) features of T tokens."""
    return rearrange(activations, "token (unit feature) -> (token feature) unit", feature=group.block)


def real_tokens(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Return (B, T) bool on the CPU: the tokens of a pass that are no padding."""
    inputs = next(given for given in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if given is not None)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape == inputs.shape[:2]:
        return mask.bool().cpu()
    return torch.ones(inputs.shape[:2], dtype=torch.bool)
