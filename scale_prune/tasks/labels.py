"""What the labels of a data set are: classes, in an order, or numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from scale_prune.rows import Text

DEFAULT_NAME = "LABEL_{}"
"""How transformers calls the classes of a config that does not name them."""


@dataclass(frozen=True)
class Labels:
    """The classes that a model tells apart.

    Attributes:
        classes: their names, in the order of the model's outputs; empty where it predicts a number.
    """

    classes: tuple[str, ...]

    def put_into(self, config: PretrainedConfig) -> None:
        """Write them into a model's config."""
        names = self.classes or (DEFAULT_NAME.format(0),)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.problem_type = "single_label_classification" if self.classes else "regression"

    def encode(self, text: Text) -> Tensor:
        """Return the labels of all rows, int64 numbers of classes or float32.

        Raises:
            ValueError: a row has no label, or one that is not among the classes, or is not a finite number.
        """
        values = text.rows[text.label][:]
        for row, value in enumerate(values, 1):
            problem = self._problem(value)
            if problem:
                raise ValueError(f"row {row} of {text.name} has {problem} in column {text.label!r}")
        if not self.classes:
            return torch.tensor([float(value) for value in values])
        return torch.tensor([self.classes.index(str(value)) for value in values])

    def _problem(self, value: Any) -> str:
        if is_missing(value):
            return "no label"
        if not self.classes:
            number = isinstance(value, int | float) and math.isfinite(value)
            return "" if number else f"the label {value!r}, where others have numbers,"
        known = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        return "" if str(value) in self.classes else f"the unknown label {value!r}, known are {known},"


def is_missing(value: Any) -> bool:
    """Tell whether a row has no label."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def of_rows(text: Text) -> Labels:
    """Return the classes of a data set: its texts or whole numbers, sorted; none where it has other numbers.

    Raises:
        ValueError: all rows have the same label.
    """
    values: Sequence[Any] = [value for value in text.rows[text.label][:] if not is_missing(value)]
    if any(isinstance(value, float) for value in values):
        return Labels(())
    found = tuple(str(value) for value in sorted(set(values)))
    if len(found) < 2:
        raise ValueError(
            f"column {text.label!r} of {text.name} has the label {', '.join(found)} only, at least 2 are needed"
            if found
            else f"column {text.label!r} of {text.name} has no label at all"
        )
    return Labels(found)


def of_model(config: PretrainedConfig) -> Labels | None:
    """Return the classes that a model was trained to tell apart, None where it is no classifier yet."""
    architectures = getattr(config, "architectures", None) or [""]
    if not architectures[0].endswith("ForSequenceClassification"):
        return None
    if config.problem_type == "regression" or config.num_labels == 1:
        return Labels(())
    id2label: Any = config.id2label
    names = [id2label[index] for index in range(len(id2label))]
    own = [str(i) if name == DEFAULT_NAME.format(i) else str(name) for i, name in enumerate(names)]
    return Labels(tuple(own))
