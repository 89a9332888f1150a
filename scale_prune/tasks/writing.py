"""Tasks whose examples are a prompt and its completion: the completion is learned, generated and compared."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from scale_prune.config import TaskConfig
from scale_prune.data import FORMS, Inputs, Split, check_tokens, templates_of
from scale_prune.models import positions_of
from scale_prune.tasks.examples import Examples, prepare, training_steps, validation_batches
from scale_prune.tasks.generation import complete
from scale_prune.tasks.metrics import METRICS
from scale_prune.tasks.task import Measured, Step, Task
from scale_prune.zero3 import Runtime

Question = tuple[Tensor, list[str]]
"""A prompt and its references."""

SHOWN = 20
"""Prompts whose completions a run writes down."""


class Writing(Task):
    """A task of completing prompts; `splits` says which examples are needed. All ranks make it together.

    Raises:
        ValueError: an example cannot be used, or a completion would go past the model's positions.
    """

    def __init__(self, inputs: Inputs, runtime: Runtime, splits: Sequence[Split]) -> None:
        super().__init__(inputs, runtime)
        with runtime.main_first():
            self.examples = {split: prepare(inputs.config, split, inputs.tokenizer) for split in splits}
        self.inputs = replace(inputs, train_rows=len(self.examples["train"]) if "train" in splits else None)
        check_tokens({split: int(each.all_tokens().max()) for split, each in self.examples.items()}, inputs)
        check_positions(inputs, self.questions)
        self.fingerprints = {split: each.fingerprint() for split, each in self.examples.items()}
        self.dropped = {split: each.dropped for split, each in self.examples.items()}

    @cached_property
    def questions(self) -> list[Question]:
        """The prompts that are completed, in order, and of each the completions of all rows with that prompt."""
        return questions_of(self.examples["validation"], self.config.task)

    @property
    def training_tokens(self) -> Tensor:
        """Prompts and completions."""
        return self.examples["train"].all_tokens()

    def steps(self, accumulation: int, first_step: int) -> Iterator[Step]:
        """Yield padded examples."""
        return training_steps(
            self.examples["train"],
            (accumulation, self.runtime.world_size, self.inputs.micro_batch_size),
            rank=self.runtime.rank,
            seed=self.config.training.seed,
            first_step=first_step,
        )

    def measure(self, engine: Any, *, thorough: bool) -> Measured:
        """Return the perplexity of the completions; where `thorough` also the metrics of those that it writes."""
        examples = self.examples["validation"]
        batches = validation_batches(
            examples,
            _num_measured(examples, self.config.data.eval_tokens),
            micro_batch_size=self.inputs.micro_batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
        )
        perplexity = self._perplexity(engine, batches)
        if not thorough:
            return Measured(perplexity=perplexity)
        prompts, references = zip(*self.questions, strict=True)
        generated = complete(
            engine,
            prompts,
            self.config.task,
            tokenizer=self.inputs.tokenizer,
            batch_size=self.config.task.generation_batch_size or self.inputs.micro_batch_size,
            runtime=self.runtime,
        )
        metrics: dict[str, float] = {}
        for name in FORMS[self.config.task.task].metrics:
            metrics |= METRICS[name](generated, references)
        return Measured(perplexity=perplexity, metrics=metrics, generated=generated[:SHOWN])

    def samples(self, generated: Mapping[str, list[str]]) -> list[dict[str, Any]]:
        """Return the first prompts, their references, and what was written."""
        bos = self.inputs.bos
        return [
            {"prompt": self.inputs.tokenizer.decode(prompt[int(prompt[0] == bos) :]), "references": references}
            | {name: texts[index] for name, texts in generated.items()}
            for index, (prompt, references) in enumerate(self.questions[:SHOWN])
        ]


def questions_of(examples: Examples, spec: TaskConfig) -> list[Question]:
    """Bring rows of one prompt together; as many prompts as `eval_examples` says, in order of their first rows."""
    completion = templates_of(spec)[1]
    found: dict[tuple[int, ...], Question] = {}
    for prompt, row in zip(examples.prompts, examples.text.rows, strict=True):
        question = found.setdefault(tuple(prompt.tolist()), (prompt, []))
        question[1].append(completion.fill(row).strip())
    return list(found.values())[: spec.eval_examples or len(found)]


def check_positions(inputs: Inputs, questions: Sequence[Question]) -> None:
    """Refuse to generate past the positions of the model, or of the one that stands beside it in the report.

    Raises:
        ValueError: the longest prompt and its completion have more tokens than there are positions.
    """
    longest, new = max(len(prompt) for prompt, _ in questions), inputs.config.task.max_new_tokens
    training, reference = inputs.config.training, inputs.config.output.reference
    writers = {training.model: inputs.model_config}
    if reference is not None:
        with suppress(OSError):  # as another check has said, and a dry run goes on
            writers[reference] = AutoConfig.from_pretrained(reference, trust_remote_code=training.trust_remote_code)
    for model, config in writers.items():
        positions = positions_of(config)
        if positions is not None and longest + new > positions:
            raise ValueError(
                f"--max_new_tokens {new} after the longest prompt, of {longest} tokens, is more than the {positions} "
                f"positions of {model}; give at most {positions - longest}"
                if positions > longest
                else f"the longest prompt has {longest} tokens, and {model} {positions} positions"
            )


def _num_measured(examples: Examples, eval_tokens: int) -> int:
    """Return how many examples, from the first on, have that many tokens together; at least one, of 0 tokens all."""
    if not eval_tokens:
        return len(examples)
    return max(1, int((examples.lengths.cumsum(0) <= eval_tokens).sum()))
