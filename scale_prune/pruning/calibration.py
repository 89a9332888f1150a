"""What calibration text says of the units: Gram matrices of their activations, and what a criterion makes of these.

Every token of the text counts, padding never, and everything adds up over tokens and ranks; so the number of ranks
changes nothing but the rounding.

The Gram matrix of group g lies whole with rank g mod W, which solves for it, so that the layers are solved side by
side. What moves, with N units in a group and F = N or N + 1 features, of heads their size times N:

    every forward pass   each group's F * F sums to the rank that keeps them       4 F^2 bytes a group
    every backward pass  likewise, of gradients, D the width of the model          4 D^2 bytes a group
    at the end           the criterion's numbers to the units' owners               4 M bytes a number

Where the matrices of all groups at once are too much, the text is read once for every portion of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from scale_prune.core import UnitGroup
from scale_prune.core.repair import WIDEST_IN_DOUBLE
from scale_prune.pruning.activations import by_unit, real_tokens
from scale_prune.pruning.backend import ShardBackend

ROWS_AT_ONCE = 1024  # of a Gram matrix, on their way to the rank that keeps it: 64 MiB at N = 16,384


class Calibration:
    """Watches forward passes, between `watching` and its end.

    Args:
        backend: the model, and this rank's place among the others.
        groups: whose activations are watched; of neurons or heads.
        activity: (T, N) float32 activations of one group to the (N,) or (K, N) numbers that add up over tokens; of
            heads, T are all features of all tokens. None for no such numbers.
        redundancy: compare what goes into the groups' layers with what comes out.
        portion: numbers of the groups whose Gram matrices are made; None for all.

    Attributes:
        grams: (F, F) float32 by number of the group, of those that this rank keeps; where the projection has a bias,
            the last feature is 1.
        output_grams: (D, D) float32 of the gradients of what comes out of the projection, likewise.
        activities: what `activity` came to, group by group, on this rank.
        tokens: that this rank has read.
    """

    def __init__(
        self,
        backend: ShardBackend,
        groups: Sequence[UnitGroup],
        *,
        activity: Callable[[Tensor], Tensor] | None = None,
        redundancy: bool = False,
        portion: Sequence[int] | None = None,
    ) -> None:
        self.backend, self.groups = backend, tuple(groups)
        self.portion = tuple(range(len(groups)) if portion is None else portion)
        self._activity, self._compares = activity, redundancy
        self._cosines = torch.zeros(len(groups), 2, device=backend.device)  # their sum, and of how many tokens
        self.grams: dict[int, Tensor] = {}
        self.output_grams: dict[int, Tensor] = {}
        self.activities: list[Tensor] = []
        if activity is not None:
            self.activities = [activity(torch.empty(0, group.num_units, device=backend.device)) for group in groups]
        self.tokens = 0
        self._real, self._seen = torch.empty(0), set[int]()  # of a pass

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward passes of the body, which all ranks make alike."""
        module = self.backend.module
        with ExitStack() as hooks:
            hooks.enter_context(module.register_forward_pre_hook(self._begin_pass, with_kwargs=True))
            for index, group in enumerate(self.groups):
                projection = module.get_submodule(group.output)
                hooks.enter_context(projection.register_forward_pre_hook(self._watcher(index)))
                if self._compares:
                    layer = module.get_submodule(layer_of(module, group.output))
                    hooks.enter_context(layer.register_forward_hook(self._comparer(index), with_kwargs=True))
            yield

    @contextmanager
    def watching_gradients(self) -> Iterator[None]:
        """Watch the backward passes of the body, of the sum of the tokens' losses; tokens without any add nothing."""
        with ExitStack() as hooks:
            for index in self.portion:
                projection = self.backend.module.get_submodule(self.groups[index].output)
                hooks.enter_context(projection.register_forward_hook(self._gradient_watcher(index)))
            yield

    def _begin_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._real = real_tokens(args, kwargs).flatten()
        self.tokens += int(self._real.sum())
        self._seen.clear()

    def _watcher(self, index: int) -> Any:
        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if index in self._seen:  # recomputed on the way back
                return
            self._seen.add(index)
            h = rearrange(args[0].detach(), "... unit -> (...) unit")[self._real.to(args[0].device)].float()
            if self._activity is not None:
                self.activities[index] += self._activity(by_unit(h, self.groups[index]))
            if index in self.portion:
                ones = h.new_ones(len(h), 1)
                features = h if getattr(module, "bias", None) is None else torch.cat([h, ones], 1)
                self._add(self.grams, index, features)

        return watch

    def _gradient_watcher(self, index: int) -> Any:
        def take(gradient: Tensor) -> None:
            self._add(self.output_grams, index, rearrange(gradient, "... output -> (...) output").float())

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(take)

        return watch

    def _comparer(self, index: int) -> Any:
        def compare(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = cosine_similarity(before.detach().float(), after.detach().float(), dim=-1).flatten()
            real = cosines[self._real.to(cosines.device)]
            self._cosines[index] += torch.stack([real.sum(), real.new_tensor(float(len(real)))])

        return compare

    def redundancy(self) -> list[float]:
        """Return the mean cosine of each group's layer over the tokens of all ranks. A collective, 8 bytes a group."""
        by_rank = self.backend.all_gather(self._cosines.flatten()).view(-1, *self._cosines.shape)
        total, count = by_rank.sum(0).unbind(1)
        return (total / count).tolist()

    def _add(self, grams: dict[int, Tensor], index: int, features: Tensor) -> None:
        """Bring what this pass adds to a Gram matrix to the rank that keeps it. A collective."""
        keeper = keeper_of(index, self.backend)
        for rows in torch.arange(features.shape[1]).split(ROWS_AT_ONCE):
            block = slice(int(rows[0]), int(rows[-1]) + 1)
            total = self.backend.reduce(features[:, block].T @ features, keeper)
            if keeper == self.backend.rank:
                if index not in grams:
                    grams[index] = torch.zeros(features.shape[1], features.shape[1], device=features.device)
                grams[index][block] += total


def portions_of(
    groups: Sequence[UnitGroup], world_size: int, num_bytes: float, *, gradients: bool = False
) -> list[list[int]]:
    """Return the numbers of the groups whose Gram matrices fit into so many bytes of every rank at a time.

    A rank keeps one of each portion at least, with `gradients` that of the output's gradients too. While it solves for
    one, there are three more in float64, of twice the size, two where it is wide. What the model computes last comes
    first, so that the repair of a portion changes nothing for those after it.
    """
    widest = max(group.num_features + 1 for group in groups)
    outputs = [member.shape[1 - member.dim] for group in groups for member in group.members if member.role == "out"]
    of_one = 4 * (widest**2 + gradients * max(outputs) ** 2)
    while_solving = (6 if widest <= WIDEST_IN_DOUBLE else 4) * 4 * widest**2
    of_a_rank = max(int((num_bytes - while_solving) / of_one), 1)
    depth = {index: (group.layer, group.kind == "neuron") for index, group in enumerate(groups)}
    return side_by_side(sorted(depth, key=lambda index: depth[index], reverse=True), world_size, of_a_rank)


def side_by_side(numbers: Sequence[int], world_size: int, of_a_rank: int = 1) -> list[list[int]]:
    """Cut numbers of groups, in their order, into parts of which no rank keeps more than so many."""
    parts: list[list[int]] = [[]]
    for number in numbers:
        if sum(other % world_size == number % world_size for other in parts[-1]) == of_a_rank:
            parts.append([])
        parts[-1].append(number)
    return parts


def keeper_of(group: int, backend: ShardBackend) -> int:
    """Return the rank that keeps the Gram matrix of group number `group`, and solves for it."""
    return group % backend.world_size


def layer_of(model: nn.Module, name: str) -> str:
    """Return the name of the layer that a module is in, of the model's list of layers.

    Raises:
        ValueError: the model has no such list.
    """
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    raise ValueError(
        f"--budget redundancy compares what goes into a layer with what comes out, and {name} is in no list of layers; "
        "give --budget uniform or log"
    )
