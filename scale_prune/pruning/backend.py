"""The line between pruning and the system that shards the parameters."""

from typing import Protocol

import torch
from torch import Tensor, nn

from scale_prune.core import Member, UnitGroup
from scale_prune.criteria import ShardView


class ShardBackend(Protocol):
    """What pruning needs of the system that shards the parameters."""

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module
    accumulation_steps: int

    @property
    def loss_scale(self) -> float:
        """What the loss of this step was multiplied by, in fp16; else 1."""

    def at_boundary(self) -> bool:
        """Tell whether the coming step will be an optimizer step, and not only accumulate gradients."""

    def steps_made(self) -> int:
        """Return how many optimizer steps the engine has made in its life, those that changed nothing included."""

    def step_applied(self) -> bool:
        """Tell whether the last optimizer step changed the weights; False where fp16 gradients overflowed."""

    def master(self, member: Member, *, grad: bool) -> ShardView:
        """Return this rank's slice of the float32 master weights, with the unscaled gradient if `grad`."""

    def working(self, member: Member) -> ShardView:
        """Return this rank's slice of what the forward pass uses."""

    def mask_working_copy(self, group: UnitGroup, mask: Tensor, *, anew: bool = False) -> None:
        """Zero the elements of units that are False in the (N,) mask, in what the forward pass uses.

        With `anew` the others are the master's again, if there is one, as a step leaves them.
        """

    def gather(self, name: str) -> Tensor:
        """Return the whole working copy of a parameter in float32, as a forward pass gathers it."""

    def reduce(self, values: Tensor, rank: int) -> Tensor:
        """Add up a tensor over ranks; the sum is `rank`'s, what the others get must not be used."""

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """Add up (W * n,) over ranks and return the n numbers of this rank."""

    def gather_on(self, values: Tensor, rank: int) -> Tensor:
        """Join the ranks' (n, ...) tensors along the first axis on one rank; the others get (0, ...)."""

    def all_gather(self, values: Tensor) -> Tensor:
        """Join the ranks' (n, ...) tensors along the first axis, in order of rank."""
