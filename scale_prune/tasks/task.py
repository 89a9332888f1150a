"""What a run needs of a task: steps of training data, and how good an engine is at it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from scale_prune.core import perplexity, token_divergence
from scale_prune.data import Inputs
from scale_prune.zero3 import Runtime


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """What one rank sees in one forward pass.

    Attributes:
        inputs: arguments of the model, `labels` among them.
        weight: factor of the pass's mean loss, so that the mean over all passes of a step is that over all predictions.
    """

    inputs: dict[str, Tensor]
    weight: float = 1.0

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """Return the inputs on a device."""
        return {name: value.to(device) for name, value in self.inputs.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """The part of one rank in an optimizer step.

    Attributes:
        micro_batches: one a forward pass.
        tokens: tokens of the whole step, over all ranks, without padding.
    """

    micro_batches: list[MicroBatch]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How good a model is.

    Attributes:
        perplexity: on the validation text; None for a task that predicts no tokens.
        metrics: other numbers by name; empty where they were not asked for.
        generated: what it writes for the first validation prompts.
    """

    perplexity: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    generated: list[str] = field(default_factory=list)

    @property
    def checked(self) -> float:
        """The number that must be the same of a model that was exported and loaded again."""
        return self.metrics["loss"] if self.perplexity is None else self.perplexity


class Task(ABC):
    """A task with its data, on this rank.

    Args:
        inputs: the run's inputs.
        runtime: the ranks.

    Attributes:
        fingerprints: hashes of what each split is, by its name.
        options: arguments of every forward pass that learns or measures.
        dropped: examples of each split that were left out because they are longer than a block.
        model_config: takes the place of the model's own when it is loaded; None leaves it.
    """

    options: ClassVar[dict[str, Any]] = {"use_cache": False}
    fingerprints: Mapping[str, str]
    dropped: Mapping[str, int] = MappingProxyType({})
    model_config: PretrainedConfig | None = None

    def __init__(self, inputs: Inputs, runtime: Runtime) -> None:
        self.inputs, self.config, self.runtime = inputs, inputs.config, runtime

    @abstractmethod
    def steps(self, accumulation: int, first_step: int) -> Iterator[Step]:
        """Yield the optimizer steps from one on, without end; the same examples for every number of ranks."""

    @abstractmethod
    def measure(self, engine: Any, *, thorough: bool) -> Measured:
        """Return how good an engine's model is; it is in evaluation mode afterwards. A collective.

        Args:
            engine: a DeepSpeed engine.
            thorough: also take the metrics for which text has to be generated.
        """

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return how far the student's logits are from the teacher's; see `token_divergence`."""
        return token_divergence(student, teacher, labels, temperature)

    @property
    @abstractmethod
    def training_tokens(self) -> Tensor:
        """All tokens of the training data, one-dimensional."""

    def token_counts(self) -> Tensor:
        """Return (V,) how often each token of the model's vocabulary occurs in the training data."""
        return torch.bincount(self.training_tokens, minlength=self.inputs.model_config.vocab_size)

    def samples(self, generated: Mapping[str, list[str]]) -> list[dict[str, Any]]:
        """Return some prompts with their references and what the models wrote, by the models' names."""
        return []

    @torch.no_grad()
    def _perplexity(self, engine: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Return the perplexity on batches of input_ids and labels, whose padding is on the right. A collective."""
        engine.eval()
        device = self.runtime.device
        value = perplexity(
            lambda input_ids: engine(input_ids=input_ids, **self.options).logits,
            ((input_ids.to(device), labels.to(device)) for input_ids, labels in batches),
            self.runtime.add_over_ranks,
        )
        engine.empty_partition_cache()  # finishes prefetches that only a backward pass would use
        return value
