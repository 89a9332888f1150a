"""Labeled texts, for encoders: each text is one example, its label is learned.

Shape letters: E examples, B of them in a forward pass, T tokens of the longest of these, C classes (1 for a number).
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, mse_loss
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedTokenizerBase

from scale_prune.config import Config
from scale_prune.criteria import CRITERIA, freezes, observes
from scale_prune.data import (
    SELF,
    Inputs,
    Pieces,
    Split,
    Template,
    Text,
    assigned,
    check_tokens,
    columns_of,
    load_text,
    templates_of,
    tokenized,
)
from scale_prune.tasks.examples import refuse_empty, short_enough
from scale_prune.tasks.label_metrics import measured
from scale_prune.tasks.labels import Labels, of_model, of_rows
from scale_prune.tasks.task import Measured, MicroBatch, Step, Task
from scale_prune.zero3 import Runtime


@dataclass(frozen=True, eq=False)
class Labeled:
    """Tokenized texts of one split with their labels.

    Attributes:
        texts: tokens with the tokenizer's special ones.
        labels: (E,) int64 numbers of classes, or float32.
        padding: the token that fills up shorter texts.
        dropped: rows that were left out because they are longer than a block.
    """

    texts: Pieces
    labels: Tensor
    padding: int
    dropped: int

    def fingerprint(self) -> str:
        """Return a hash of all tokens, of where they are cut, and of the labels."""
        found = hashlib.sha256()
        self.texts.add_to(found)
        found.update(self.labels.numpy().data)
        return found.hexdigest()

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Put examples into a batch: input_ids and attention_mask, int64 (B, T), and labels (B,)."""
        texts = [self.texts[row].long() for row in rows]
        return {
            "input_ids": pad_sequence(texts, batch_first=True, padding_value=self.padding),
            "attention_mask": pad_sequence([torch.ones_like(each) for each in texts], batch_first=True),
            "labels": self.labels[list(rows)],
        }


class Classification(Task):
    """The task of labeling texts; `splits` says which are needed. All ranks make it together.

    The classes are the model's own where it is a classifier already, else those of the training labels.

    Raises:
        ValueError: the data cannot be used, or model, teacher, reference and data have different classes.
    """

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, inputs: Inputs, runtime: Runtime, splits: Sequence[Split]) -> None:
        super().__init__(inputs, runtime)
        texts = {split: read(inputs.config, split) for split in splits}
        self.labels = labels_for(inputs, texts[splits[0]], training_follows="train" in splits)
        with runtime.main_first():
            self.data = {
                split: prepare(inputs.config, text, inputs.tokenizer, self.labels) for split, text in texts.items()
            }
        check_tokens({split: int(each.texts.joined().max()) for split, each in self.data.items()}, inputs)
        self.fingerprints = {split: each.fingerprint() for split, each in self.data.items()}
        self.dropped = {split: each.dropped for split, each in self.data.items()}
        config = copy.deepcopy(inputs.model_config)
        self.labels.put_into(config)
        rows = len(self.data["train"].texts) if "train" in splits else None
        self.inputs = replace(inputs, model_config=config, train_rows=rows)
        self.model_config = config

    @property
    def training_tokens(self) -> Tensor:
        """All texts."""
        return self.data["train"].texts.joined()

    def steps(self, accumulation: int, first_step: int) -> Iterator[Step]:
        """Yield padded texts; all passes have as many examples, so that a mean of means is the mean."""
        data = self.data["train"]
        lengths = data.texts.lengths
        shape = (accumulation, self.runtime.world_size, self.inputs.micro_batch_size)
        for chosen in assigned(len(data.texts), shape, seed=self.config.training.seed, first_step=first_step):
            passes = [MicroBatch(inputs=data.collate(rows)) for rows in chosen[:, self.runtime.rank].tolist()]
            yield Step(micro_batches=passes, tokens=int(lengths[chosen].sum()))

    @torch.no_grad()
    def measure(self, engine: Any, *, thorough: bool) -> Measured:
        """Return the metrics of the labels; there is no perplexity."""
        engine.eval()
        data, batch, device = self.data["validation"], self.inputs.micro_batch_size, self.runtime.device
        count = min(self.config.task.eval_examples or len(data.texts), len(data.texts))
        logits = torch.zeros(count, max(1, len(self.labels.classes)), dtype=torch.float64)
        for start in range(0, count, batch * self.runtime.world_size):
            first = start + self.runtime.rank * batch
            own = range(min(first, count), min(first + batch, count))
            inputs = data.collate(own or [0])  # a rank without examples must take part
            found = engine(**{name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}).logits
            logits[own.start : own.stop] = found[: len(own)].double().cpu()
        engine.empty_partition_cache()  # as after every evaluation
        return Measured(perplexity=None, metrics=measured(self.runtime.add_over_ranks(logits), data.labels[:count]))

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return T^2 * KL(teacher || student), a mean over the texts; of numbers the mean squared difference."""
        if not self.labels.classes:
            return mse_loss(student.float(), teacher.float())
        found, wanted = (log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
        return temperature**2 * kl_div(found, wanted, reduction="batchmean", log_target=True)


def read(config: Config, split: Split) -> Text:
    """Open the rows of one split."""
    return load_text(config.data, split, columns_of(config.task), config.task.label_column)


def labels_for(inputs: Inputs, text: Text, *, training_follows: bool) -> Labels:
    """Return the classes of a run, or of an evaluation.

    Args:
        inputs: the model, and the names of teacher and reference.
        text: the training rows; of an evaluation, which has a classifier, the validation rows.
        training_follows: False for an evaluation, which needs a classifier.

    Raises:
        ValueError: the rows have no classes, where the model has none of its own, or teacher or reference has others;
            or the model has none and cannot learn them first.
    """
    config, own = inputs.config, of_model(inputs.model_config)
    if own is None:
        _check_learns(config, training_follows=training_follows)
    labels = own or of_rows(text)  # what is not of the model's own, the row tells where it is encoded
    for flag, name in (("teacher", config.distillation.teacher), ("reference", config.output.reference)):
        if name is not None and not labels.agrees(_classes_of(flag, name, inputs), text):
            count = len(labels.classes)
            wanted = f"classifier of the {count} classes" if count else "predictor of the numbers"
            raise ValueError(f"--{flag} {name} is no {wanted} of the data")
    return labels


def _classes_of(flag: str, name: str, inputs: Inputs) -> Labels | None:
    if (flag, name) == ("teacher", SELF):
        return of_model(inputs.model_config)
    try:
        return of_model(AutoConfig.from_pretrained(name, trust_remote_code=inputs.config.training.trust_remote_code))
    except OSError as error:  # as another check has said, and a dry run goes on
        raise ValueError(f"--{flag} {name} cannot be read, so that its classes are not known") from error


def _check_learns(config: Config, *, training_follows: bool) -> None:
    """Refuse a model that is no classifier where it cannot become one before it is measured, or judges units.

    Raises:
        ValueError: nothing is trained, or not before units are judged by the loss.
    """
    training, pruning = config.training, config.pruning
    if not training_follows or training.max_steps + training.recovery_steps == 0:
        raise ValueError(f"--model {training.model} is no classifier, there is nothing to measure")
    asked = "budget" if pruning.budget in ("measured", "search") else "criterion"
    by_loss = "output_grad" in CRITERIA[pruning.criterion].needs or observes(pruning, trains=False)
    if freezes(pruning) or (training.max_steps == 0 and pruning.remaining < 1 and (by_loss or asked == "budget")):
        raise ValueError(
            f"--model {training.model} is no classifier yet, and --{asked} {getattr(pruning, asked)}, before any "
            "weight is trained, would choose units by classes told apart at random; fine-tune it first with "
            f"--remaining 1, or choose another --{asked}"
        )


def prepare(config: Config, text: Text, tokenizer: PreTrainedTokenizerBase, labels: Labels) -> Labeled:
    """Tokenize the texts of one split, with the tokenizer's special tokens.

    Raises:
        ValueError: a label is missing or unknown, a text is empty or too long, or the tokenizer has no token to pad
            with.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad_token, which fills up the shorter texts of a batch")
    encoded = labels.encode(text)
    (template,) = templates_of(config.task)
    tokens = tokenized(text, partial(_encode, tokenizer=tokenizer, template=template), ("prompt",))["prompt"]
    refuse_empty(config, text, {"prompt": tokens})
    kept = short_enough(config, text, {"text": tokens})
    return Labeled(
        texts=Pieces(tokens, kept),
        labels=encoded[torch.from_numpy(kept)],
        padding=int(tokenizer.pad_token_id),
        dropped=len(text.rows) - len(kept),
    )


def _encode(
    batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerBase, template: Template
) -> dict[str, list[list[int]]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    texts = [template.fill(row) for row in rows]
    ids = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    # A text of blanks alone is an empty one, and is refused as such.
    return {"prompt": [own if text.strip() else [] for own, text in zip(ids, texts, strict=True)]}
