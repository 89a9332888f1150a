"""Inside a finished model: how sensitive the loss is to each neuron, and how much neurons repeat each other.

The model is sharded over the ranks; each rank keeps the sums of the neurons it owns. One pass over some training text
gives everything.

Memory of a rank, beside the model, its gradients and activations, for M neurons on W ranks: 4 * K bytes for each of its
M / W neurons, where K is `sample_units` or else N, the neurons of a layer; 12 * K bytes more for each of its neurons of
one layer at the end; T * N activations of one layer and T / W * M of all layers, where T is `sample_tokens` or else the
tokens of a batch on all ranks. GPT-J (M = 458,752, N = 16,384) on 8 ranks has 3.5 GiB of sums, and 0.11 GiB with 512.

With `sample_units` K neurons of each layer are drawn, the same ones on any number of ranks, and compared with all
neurons of the layer:
    similarity, of any neuron: its mean |cosine| to the drawn ones; unbiased over the draw.
    nearest neighbor, similar, of drawn neurons only: exact, since all neurons are looked at. So uniqueness, a share of
        the drawn, is unbiased, with a standard error of at most 0.5 / sqrt(K) a layer; the median nearest neighbor is
        consistent. (Looked for among the drawn alone, neighbors would be missed, and uniqueness too high.)
    explained variance: by the other drawn neurons, at most CHOSEN; fewer explain less, so it is biased downwards.
Sensitivity is exact in any case. Numbers of several layers together weigh each layer by its live neurons.

With `sample_tokens` similarities are those on a random part of each batch's tokens. The error of a cosine is about
1 / sqrt(tokens), which raises |cosines| near 0 and with them the nearest neighbor; explained variance is biased
upwards where tokens are not many times CHOSEN; neurons that fire on none of the tokens count as absent.

Source: arXiv 2302.03773, section 5, for sensitivity and uniqueness. Beyond it: mean sensitivity of neurons beside the
sum, which falls with the number of neurons by construction; correlation, which the mean activation does not blur; the
nearest neighbor; explained variance.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_prune.core import (
    Member,
    Products,
    UnitGroup,
    UnitLayout,
    explained_variance,
    has_similar,
    mean_absolute,
    nearest,
    sample_units,
)
from scale_prune.criteria import CRITERIA
from scale_prune.data import Inputs, TokenBlocks, training_batches
from scale_prune.models import unit_groups
from scale_prune.pruning import ActivationSampler
from scale_prune.zero3 import Runtime, Zero3Backend, give_back, load_model, release, training_engine

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
        sampled: (N,) bool: live neurons whose neighbors were looked for; all of them without `sample_units`.
        sensitivity: (N,) mean over batches of |sum of w * dL/dw|.
        similarity: (N,) mean |cosine| to the other live neurons, or to those of the sample.
        nearest: (N,) largest |cosine| to another neuron; 0 where not sampled.
        correlated: (N,) largest |correlation| to another neuron; 0 where not sampled.
        similar: (N,) bool: a later neuron has a cosine of at least 0.8; False where not sampled.
        explained: (E,) R^2 of some sampled neurons, as linear combinations of the others of them.
    """

    name: str
    layer: int
    live: Tensor
    sampled: Tensor
    sensitivity: Tensor
    similarity: Tensor
    nearest: Tensor
    correlated: Tensor
    similar: Tensor
    explained: Tensor

    @property
    def uniqueness(self) -> float:
        """The share of sampled neurons without a similar later one."""
        return 1.0 - int(self.similar.sum()) / max(1, int(self.sampled.sum()))


@dataclass(frozen=True)
class Sampling:
    """How much of a model is looked at.

    Attributes:
        units: neurons of each layer that are compared with all others, at least 2; None for all.
        tokens: tokens of each batch, over all ranks, whose activations count, at least 1; None for all.
    """

    units: int | None = None
    tokens: int | None = None


def analyze(
    inputs: Inputs, blocks: TokenBlocks, batches: int, runtime: Runtime, sampling: Sampling = Sampling()
) -> list[GroupAnalysis]:
    """Measure every neuron of a model. A collective.

    Args:
        inputs: the model and its settings; the batch of a step is what sensitivity is a mean over.
        blocks: the text.
        batches: steps of text to take in.
        runtime: the ranks.
        sampling: of which neurons and tokens; default: all.

    Returns:
        one element a group, the same on all ranks.

    Raises:
        ValueError: the model is of an unknown family.
    """
    engine, groups = _still_engine(inputs)
    measuring = Measuring(Zero3Backend(engine), groups, inputs, sampling)
    steps = training_batches(
        blocks,
        batch_size=inputs.batch_size,
        micro_batch_size=inputs.micro_batch_size,
        accumulation=engine.gradient_accumulation_steps(),
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=inputs.config.training.seed,
    )
    for micro_batches in steps:
        measuring.step(engine, micro_batches)
        if measuring.steps == batches:
            break
    found = list(measuring.results(runtime))
    release(engine)
    give_back()
    return found


def _still_engine(inputs: Inputs) -> tuple[Any, tuple[UnitGroup, ...]]:
    """Return an engine that makes gradients but never changes the weights, and the model's groups."""
    still = {"optimizer": STILL, "zero_allow_untested_optimizer": True}
    ds_config = {key: value for key, value in inputs.ds_config.items() if key != "scheduler"} | still
    training = inputs.config.training
    model = load_model(str(training.model), ds_config, trust_remote_code=training.trust_remote_code)
    groups = unit_groups(model)
    engine = training_engine(model, ds_config)
    engine.train()
    engine.module.eval()  # no dropout
    return engine, groups


class Measuring:
    """The sums of one analysis, of the neurons that this rank owns."""

    def __init__(
        self, backend: Zero3Backend, groups: tuple[UnitGroup, ...], inputs: Inputs, sampling: Sampling
    ) -> None:
        self.backend, self.groups = backend, groups
        self.layout = UnitLayout(groups, backend.world_size)
        self.spans = self.layout.owned_spans(backend.rank)
        self.samples = [
            sample_units(group.num_units, sampling.units, index).to(backend.device)
            for index, group in enumerate(groups)
        ]
        self.products = {
            s.index: Products(s.group.num_units, s.first, s.last, self.samples[s.index]) for s in self.spans
        }
        self.seed = inputs.config.training.seed
        self.criterion = SENSITIVITY(inputs.config.pruning, self.seed)
        self.sampler = ActivationSampler(backend, groups, sampling.tokens)
        self.sensitivity = torch.zeros(self.layout.per_rank, device=backend.device)
        self.steps = 0

    def step(self, engine: Any, micro_batches: list[Tensor]) -> None:
        """Take in one batch, unless its gradients overflow in fp16; the weights stay as they are."""
        self.sampler.arm(self.seed, self.steps)
        for micro_batch in micro_batches:
            input_ids = micro_batch.to(self.backend.device)
            engine.backward(engine(input_ids=input_ids, labels=input_ids, use_cache=False).loss)
            totals = self._totals() if self.backend.at_boundary() else None
            engine.step()
        if self.backend.step_applied():
            assert totals is not None
            self.sensitivity += totals.abs()
            self._take_activations()
            self.steps += 1
        self.sampler.disarm()

    @torch.no_grad()
    def _totals(self) -> Tensor:
        """Return the owned units' sums of w * dL/dw."""
        line = torch.zeros(self.layout.padded, device=self.backend.device)
        for index, group in enumerate(self.groups):
            for member in group.members:
                line[self.layout.slice_of(index)] += self._share(member)
        return self.backend.reduce_scatter(line)

    def _share(self, member: Member) -> Tensor:
        return self.criterion.share(self.backend.master(member, grad=True)).float()

    @torch.no_grad()
    def _take_activations(self) -> None:
        for index, activations in enumerate(self.sampler.take(self.layout.owners)):
            if index in self.products:
                self.products[index].update(activations)

    @torch.no_grad()
    def results(self, runtime: Runtime) -> Iterator[GroupAnalysis]:
        """Yield what was found, group by group. A collective."""
        lives = self._gathered(lambda index, products: products.squares[products.first : products.last] > 0)
        sensitivity = self._split(self.backend.all_gather(self.sensitivity) / max(1, self.steps))
        similarity = self._gathered(lambda index, p: mean_absolute(p.cosines(), lives[index].bool(), p.first, p.sample))
        for index, group in enumerate(self.groups):
            live, sample = lives[index].bool(), self.samples[index]
            live_sample = sample[live[sample]]
            near, correlated, similar = self._neighbors(index)
            yield GroupAnalysis(
                name=group.name,
                layer=group.layer,
                live=live.cpu(),
                sampled=_spread(torch.ones_like(live_sample), live_sample, live).bool().cpu(),
                sensitivity=sensitivity[index].cpu(),
                similarity=similarity[index].cpu(),
                nearest=_spread(near, sample, live).cpu(),
                correlated=_spread(correlated, sample, live).cpu(),
                similar=_spread(similar, sample, live).bool().cpu(),
                explained=explained_variance(self._covariances(index, live_sample, runtime)).cpu(),
            )

    def _gathered(self, line: Callable[[int, Products], Tensor]) -> list[Tensor]:
        """Return (N,) numbers of each group, of which `line` gives those of the owned units."""
        own = torch.zeros(self.layout.per_rank, device=self.backend.device)
        for span in self.spans:
            own[span.place] = line(span.index, self.products[span.index]).float()
        return self._split(self.backend.all_gather(own))

    def _split(self, line: Tensor) -> list[Tensor]:
        return [line[self.layout.slice_of(index)] for index in range(len(self.groups))]

    def _neighbors(self, index: int) -> Tensor:
        """Return (3, K) of a group's sampled units: largest |cosine| and |correlation|, and whether one is similar."""
        own = torch.zeros(1, 3, len(self.samples[index]), device=self.backend.device)
        if index in self.products:
            products = self.products[index]
            cosines = products.cosines()
            own[0, 0] = nearest(cosines)
            own[0, 2] = has_similar(cosines, products.first, products.sample)
            del cosines
            own[0, 1] = nearest(products.correlations())
        return self.backend.all_gather(own).amax(0)

    def _covariances(self, index: int, live_sample: Tensor, runtime: Runtime) -> Tensor:
        """Return the (E, E) covariances of some live sampled units of a group, of which each rank has some rows."""
        places = live_sample.cpu()
        generator = torch.Generator().manual_seed(index)
        chosen = places[torch.randperm(len(places), generator=generator)[:CHOSEN]].sort().values
        rows = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
        if index in self.products:
            found = self.products[index]
            own = (chosen >= found.first) & (chosen < found.last)
            columns = torch.searchsorted(found.sample.cpu(), chosen)
            means = (found.sums / found.count).cpu().double()
            sums = found.products.cpu()[chosen[own] - found.first][:, columns].double()
            rows[own] = sums / found.count - means[chosen[own], None] * means[chosen]
        return runtime.add_over_ranks(rows)


def _spread(values: Tensor, units: Tensor, live: Tensor) -> Tensor:
    """Return (N,) the values of some units, 0 of the others."""
    line = torch.zeros(len(live), device=live.device)
    line[units] = values.float()
    return line
