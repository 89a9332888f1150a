"""Pruning without DeepSpeed: plain PyTorch models that are trained data-parallel, their ranks being threads.

Each rank holds a whole replica. What pruning sees of it are the slices that ZeRO-3 would have cut, with NaN where
ZeRO-3 leaves memory uninitialized.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from scale_prune.core.groups import Member, UnitGroup
from scale_prune.core.shards import shard_bounds
from scale_prune.criteria import CRITERIA, ShardView
from scale_prune.data.batches import TokenBlocks, training_batches
from scale_prune.pruning.pruner import Pruner

T = TypeVar("T")

MASKING = [
    name for name, criterion in CRITERIA.items() if "gram" not in criterion.needs and not criterion.freezes
]  # by steps, not in rounds

DROPOUTS: dict[str, tuple[str, ...]] = {
    "gpt_neo": ("attention_dropout", "embed_dropout", "resid_dropout"),
    "gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    "gptj": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    "opt": ("dropout", "attention_dropout", "layerdrop"),
}


def steady_model(model_type: str, **settings: Any) -> PreTrainedModel:
    """Return a tiny model that computes the same in training as in evaluation: no dropout."""
    without: dict[str, Any] = dict.fromkeys(DROPOUTS.get(model_type, ()), 0.0)
    return tiny_model(model_type, **without, **settings)


class Exchange:
    """Where the ranks meet.

    Args:
        world_size: number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = Barrier(world_size, timeout=60)
        self._slots: list[Tensor] = [torch.empty(0)] * world_size

    def all(self, rank: int, value: Tensor) -> list[Tensor]:
        """Give a tensor and get everybody's, in order of rank."""
        self._slots[rank] = value
        self.barrier.wait()
        values = list(self._slots)
        self.barrier.wait()
        return values


def run_ranks(worker: Callable[[Exchange, int], T], world_size: int) -> list[T]:
    """Call a worker on every rank, in threads of their own; one that raises ends the others."""
    exchange = Exchange(world_size)

    def guarded(rank: int) -> T:
        try:
            return worker(exchange, rank)
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as threads:
        futures = [threads.submit(guarded, rank) for rank in range(world_size)]
    errors = [future.exception() for future in futures]
    # The others fail because their meeting was called off.
    for error in sorted(filter(None, errors), key=lambda error: type(error).__name__ == "BrokenBarrierError"):
        raise error
    return [future.result() for future in futures]


class InMemoryBackend:
    """A replica with a float32 master and AdamW; behaves like an engine and like a shard backend.

    Args:
        model: a Hugging Face model, the working copy, of any floating type.
        learning_rate: of the weights.
        accumulation_steps: backward passes in an optimizer step.
        exchange: where the ranks meet; None for a rank by itself.
        rank: this rank.
    """

    def __init__(
        self,
        model: Any,
        *,
        learning_rate: float = 1e-2,
        accumulation_steps: int = 1,
        exchange: Exchange | None = None,
        rank: int = 0,
    ) -> None:
        self.module, self.accumulation_steps, self.rank = model, accumulation_steps, rank
        self.exchange = exchange or Exchange(1)
        self.world_size, self.device = self.exchange.world_size, torch.device("cpu")
        self.parameters = dict(model.named_parameters())
        self.masters = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=learning_rate, weight_decay=0.0)
        self.passes = self.steps = 0
        self.loss_scale = 1.0
        self.overflow = False

    # --- what an engine does ---------------------------------------------------------------------------------

    def __call__(self, **inputs: Any) -> Any:
        """Make a forward pass."""
        return self.module(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradient; at the boundary, average it over the ranks."""
        (loss / self.accumulation_steps).backward()
        self.passes += 1
        if self.at_boundary():
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad = torch.stack(self.exchange.all(self.rank, parameter.grad)).mean(0)

    def step(self) -> None:
        """At the boundary, change the master and write the working copy anew; if `overflow` is set, do not."""
        if not self.at_boundary():
            return
        self.passes, self.steps = 0, self.steps + 1
        if not self.overflow:
            for name, master in self.masters.items():
                gradient = self.parameters[name].grad
                master.grad = None if gradient is None else gradient.float()
            self.optimizer.step()
            for name, parameter in self.parameters.items():
                parameter.data.copy_(self.masters[name])
        for parameter in self.parameters.values():
            parameter.grad = None

    # --- what pruning needs ----------------------------------------------------------------------------------

    def at_boundary(self) -> bool:
        """Tell whether all passes of the step are made."""
        return self.passes == self.accumulation_steps

    def steps_made(self) -> int:
        """Return how many optimizer steps were made."""
        return self.steps

    def step_applied(self) -> bool:
        """Tell whether the last step changed the weights."""
        return not self.overflow

    def master(self, member: Member, *, grad: bool) -> ShardView:
        """Return this rank's slice of the master."""
        gradient = self.parameters[member.name].grad
        assert gradient is not None or not grad
        return self._view(member, self.masters[member.name], gradient if grad else None)

    def working(self, member: Member) -> ShardView:
        """Return this rank's slice of the working copy."""
        return self._view(member, self.parameters[member.name].detach(), None)

    def mask_working_copy(self, group: UnitGroup, mask: Tensor, *, anew: bool = False) -> None:
        """Zero the removed units."""
        for member in group.members:
            if anew:
                self.parameters[member.name].data.copy_(self.masters[member.name])
            self.parameters[member.name].data.view(member.unit_shape).movedim(member.unit_dim, 0)[~mask] = 0.0

    def gather(self, name: str) -> Tensor:
        """Return a parameter's whole working copy."""
        return self.parameters[name].detach().float().clone()

    def reduce(self, values: Tensor, rank: int) -> Tensor:
        """Add up a tensor over ranks."""
        return torch.stack(self.exchange.all(self.rank, values)).sum(0)

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """Add up and return this rank's part."""
        return torch.stack(self.exchange.all(self.rank, values)).sum(0).chunk(self.world_size)[self.rank]

    def gather_on(self, values: Tensor, rank: int) -> Tensor:
        """Join everybody's tensors for one."""
        return self.all_gather(values)[: None if rank == self.rank else 0]

    def all_gather(self, values: Tensor) -> Tensor:
        """Join everybody's tensors."""
        return torch.cat(self.exchange.all(self.rank, values))

    def _view(self, member: Member, weight: Tensor, grad: Tensor | None) -> ShardView:
        start, _ = shard_bounds(weight.numel(), self.rank, self.world_size)
        return ShardView(member, start, self._slice(weight), None if grad is None else self._slice(grad))

    def _slice(self, full: Tensor) -> Tensor:
        size = -(-full.numel() // self.world_size)
        padded = torch.full((size * self.world_size,), torch.nan)
        padded[: full.numel()] = full.flatten()
        return padded[size * self.rank :][: shard_bounds(full.numel(), self.rank, self.world_size)[1]]


def token_blocks(vocabulary: int, *, blocks: int = 24, length: int = 7, seed: int = 0) -> TokenBlocks:
    """Return blocks of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return TokenBlocks(torch.randint(vocabulary, (blocks * length,), generator=generator, dtype=torch.int32), length)


def train(
    engine: Any,
    pruner: Pruner,
    blocks: TokenBlocks,
    steps: int,
    *,
    batch_size: int = 6,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Train and prune, by an engine of any kind: the loop of a user.

    Args:
        engine: an `InMemoryBackend` or an engine of DeepSpeed.
        pruner: its pruner.
        blocks: the text.
        steps: optimizer steps.
        batch_size: blocks in a step, over all ranks; the ranks times the accumulation steps divide it.
        after: called after every optimizer step.
    """
    backend = pruner.backend
    backend.module.train()
    passes = backend.world_size * backend.accumulation_steps
    batches = training_batches(
        blocks,
        batch_size=batch_size,
        micro_batch_size=batch_size // passes,
        accumulation=backend.accumulation_steps,
        rank=backend.rank,
        world_size=backend.world_size,
        seed=0,
        first_step=pruner.step,
    )
    for _, micro_batches in zip(range(steps), batches, strict=False):
        for micro_batch in micro_batches:
            input_ids = micro_batch.to(backend.device)
            loss = engine(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            engine.backward(loss)
            pruner.after_backward()
            engine.step()
            pruner.after_step()
        after()


def members_by_unit(tensors: Callable[[str], Any], groups: Iterable[UnitGroup]) -> list[Tensor]:
    """Return for each group the (N,) sums of absolute values by unit, of full tensors by parameter name."""
    return [
        sum(
            tensors(m.name).detach().cpu().double().abs().reshape(m.unit_shape).movedim(m.unit_dim, 0).flatten(1).sum(1)
            for m in group.members
        )
        + torch.zeros(group.num_units)
        for group in groups
    ]


def zeros(tensors: Callable[[str], Any], groups: Sequence[UnitGroup]) -> list[Tensor]:
    """Return for each group (N,) bool: the units whose members are all zero."""
    return [sums == 0 for sums in members_by_unit(tensors, groups)]
