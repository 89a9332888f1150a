"""Inside a finished model: how sensitive the loss is to each neuron, and how much neurons repeat each other.

The model is sharded over the ranks; each rank keeps the sums of the neurons it owns. One pass over some training text
gives everything.

Source: arXiv 2302.03773, section 5, for sensitivity and uniqueness. Beyond it: mean sensitivity of neurons beside the
sum, which falls with the number of neurons by construction; correlation, which the mean activation does not blur; the
nearest neighbour; explained variance.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from scale_prune.activations import ActivationSampler
from scale_prune.batches import TokenBlocks, training_batches
from scale_prune.core.groups import Member, UnitGroup, UnitLayout
from scale_prune.core.redundancy import Products, explained_variance, has_similar, mean_absolute, nearest
from scale_prune.criteria import CRITERIA
from scale_prune.families import unit_groups
from scale_prune.inputs import Inputs
from scale_prune.zero3 import Runtime, Zero3Backend
from scale_prune.zero3.runtime import load_model, release, training_engine

CHOSEN = 512
"""Neurons of a group among which explained variance is computed."""
STILL = {"type": "SGD", "params": {"lr": 0.0}}
SENSITIVITY = CRITERIA["sensitivity"]


@dataclass(frozen=True, eq=False)
class GroupAnalysis:
    """The neurons of one group.

    Attributes:
        name: of the group.
        layer: index of its layer.
        live: (N,) bool: neurons that are there; False for the zeros that a padded layout has.
        sensitivity: (N,) mean over batches of |sum of w * dL/dw|.
        similarity: (N,) mean |cosine| to the other live neurons.
        nearest: (N,) largest |cosine| to another neuron.
        correlated: (N,) largest |correlation| to another neuron.
        similar: (N,) bool: a later neuron has a cosine of at least 0.8.
        explained: (K,) R^2 of some live neurons, as linear combinations of the others of them.
    """

    name: str
    layer: int
    live: Tensor
    sensitivity: Tensor
    similarity: Tensor
    nearest: Tensor
    correlated: Tensor
    similar: Tensor
    explained: Tensor

    @property
    def uniqueness(self) -> float:
        """The share of live neurons without a similar later one."""
        return 1.0 - int(self.similar.sum()) / max(1, int(self.live.sum()))


def analyse(inputs: Inputs, blocks: TokenBlocks, batches: int, runtime: Runtime) -> list[GroupAnalysis]:
    """Measure every neuron of a model. A collective.

    Args:
        inputs: the model and its settings; the batch of a step is what sensitivity is a mean over.
        blocks: the text.
        batches: steps of text to take in.
        runtime: the ranks.

    Returns:
        one element a group, the same on all ranks.

    Raises:
        ValueError: the model is of an unknown family.
    """
    still = {"optimizer": STILL, "zero_allow_untested_optimizer": True}
    ds_config = {key: value for key, value in inputs.ds_config.items() if key != "scheduler"} | still
    training = inputs.config.training
    model = load_model(str(training.model), ds_config, trust_remote_code=training.trust_remote_code)
    groups = unit_groups(model)
    engine = training_engine(model, ds_config)
    engine.train()
    engine.module.eval()  # no dropout
    measuring = Measuring(Zero3Backend(engine), groups, inputs)
    steps = training_batches(
        blocks,
        batch_size=inputs.batch_size,
        micro_batch_size=inputs.micro_batch_size,
        accumulation=engine.gradient_accumulation_steps(),
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=training.seed,
    )
    for number, micro_batches in enumerate(islice(steps, batches)):
        measuring.step(engine, micro_batches, number)
    found = list(measuring.results(runtime))
    release(engine)
    return found


class Measuring:
    """The sums of one analysis, of the neurons that this rank owns."""

    def __init__(self, backend: Zero3Backend, groups: tuple[UnitGroup, ...], inputs: Inputs) -> None:
        self.backend, self.groups = backend, groups
        self.layout = UnitLayout(groups, backend.world_size)
        self.spans = self.layout.owned_spans(backend.rank)
        self.products = [Products(s.group.num_units, s.first, s.last, backend.device) for s in self.spans]
        self.criterion = SENSITIVITY(inputs.config.pruning, inputs.config.training.seed)
        self.tokens = inputs.micro_batch_size * inputs.config.data.block_size
        self.sampler = ActivationSampler(backend.module, groups, self.tokens)
        self.sensitivity = torch.zeros(self.layout.per_rank, device=backend.device)
        self.steps = 0

    def step(self, engine: Any, micro_batches: list[Tensor], number: int) -> None:
        """Take in one batch; the weights stay as they are."""
        self.sampler.arm(number)
        for micro_batch in micro_batches:
            input_ids = micro_batch.to(self.backend.device)
            engine.backward(engine(input_ids=input_ids, labels=input_ids, use_cache=False).loss)
            if self.backend.at_boundary():
                self._take_gradients()
            engine.step()
        self._take_activations(self.sampler.take(len(micro_batches)))
        self.steps += 1

    @torch.no_grad()
    def _take_gradients(self) -> None:
        line = torch.zeros(self.layout.padded, device=self.backend.device)
        for index, group in enumerate(self.groups):
            for member in group.members:
                line[self.layout.slice_of(index)] += self._share(member)
        self.sensitivity += self.backend.reduce_scatter(line).abs()

    def _share(self, member: Member) -> Tensor:
        return self.criterion.share(self.backend.master(member, grad=True)).float()

    @torch.no_grad()
    def _take_activations(self, sampled: list[Tensor]) -> None:
        owned = {span.index: products for span, products in zip(self.spans, self.products, strict=True)}
        for index, own_tokens in enumerate(sampled):
            activations = self.backend.all_gather(own_tokens)
            if index in owned:
                owned[index].update(activations)

    @torch.no_grad()
    def results(self, runtime: Runtime) -> Iterator[GroupAnalysis]:
        """Yield what was found, group by group. A collective."""
        live = self._gathered(lambda products: products.squares[products.first : products.last]) > 0
        sensitivity = self._split(self.backend.all_gather(self.sensitivity) / max(1, self.steps))
        lives = self._split(live)
        of_group = {id(products): lives[span.index] for span, products in zip(self.spans, self.products, strict=True)}
        lines = {
            "similarity": lambda p: mean_absolute(p.cosines(), of_group[id(p)], p.first),
            "nearest": lambda p: nearest(p.cosines(), p.first),
            "correlated": lambda p: nearest(p.correlations(), p.first),
            "similar": lambda p: has_similar(p.cosines(), p.first).float(),
        }
        columns = {name: self._split(self._gathered(line)) for name, line in lines.items()}
        for index, group in enumerate(self.groups):
            yield GroupAnalysis(
                name=group.name,
                layer=group.layer,
                live=lives[index].cpu(),
                sensitivity=sensitivity[index].cpu(),
                similarity=columns["similarity"][index].cpu(),
                nearest=columns["nearest"][index].cpu(),
                correlated=columns["correlated"][index].cpu(),
                similar=columns["similar"][index].bool().cpu(),
                explained=explained_variance(self._covariances(index, lives[index], runtime)).cpu(),
            )

    def _gathered(self, line: Callable[[Products], Tensor]) -> Tensor:
        """Return (M,) numbers by unit, of which `line` gives those of the owned units of a group."""
        own = torch.zeros(self.layout.per_rank, device=self.backend.device)
        for span, products in zip(self.spans, self.products, strict=True):
            own[span.place] = line(products).float()
        return self.backend.all_gather(own)

    def _split(self, line: Tensor) -> list[Tensor]:
        return [line[self.layout.slice_of(index)] for index in range(len(self.groups))]

    def _covariances(self, index: int, live: Tensor, runtime: Runtime) -> Tensor:
        """Return the (K, K) covariances of some live units of a group, of which each rank has some rows."""
        places = live.nonzero().flatten().cpu()
        generator = torch.Generator().manual_seed(index)
        chosen = places[torch.randperm(len(places), generator=generator)[:CHOSEN]].sort().values
        rows = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
        for span, products in zip(self.spans, self.products, strict=True):
            if span.index == index:
                own = (chosen >= span.first) & (chosen < span.last)
                means = (products.sums / products.count).cpu().double()
                sums = products.products.cpu()[chosen[own] - span.first][:, chosen].double()
                rows[own] = sums / products.count - means[chosen[own], None] * means[chosen]
        return runtime.add_over_ranks(rows)
