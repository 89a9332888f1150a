"""What the labels of a data set are: classes, in an order, or numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from scale_prune.data import Text, say

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
        values = _values(text, self.classes)
        for row, value in enumerate(values):
            problem = self._problem(value)
            if problem:
                raise ValueError(f"row {text.number(row)} of {text.name} has {problem} in column {text.label!r}")
        if not self.classes:
            return torch.tensor([float(value) for value in values])
        places = {name: place for place, name in enumerate(self.classes)}
        return torch.tensor([places[str(value)] for value in values])

    def _problem(self, value: Any) -> str:
        if is_missing(value):
            return "no label"
        if not self.classes:
            return "" if _is_number(value) else f"the label {value!r}, which is no number,"
        known = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        return "" if str(value) in self.classes else f"the unknown label {value!r}, known are {known},"

    def agrees(self, other: "Labels | None", text: Text) -> bool:
        """Tell whether another model has the same classes; it may have the numbers of names that the data set gives."""
        names = _names(text)
        numbered = tuple(map(str, range(len(names))))
        return self == other or (other is not None and {self.classes, other.classes} == {names, numbered})


def is_missing(value: Any) -> bool:
    """Tell whether a row has no label."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    """Tell whether a label is a number; those of a csv file are texts where one of them is none."""
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _names(text: Text) -> tuple[str, ...]:
    """Return the names that a data set itself gives to its labels' numbers."""
    return tuple(getattr(text.rows.features[text.label], "names", ()))


def _values(text: Text, classes: Sequence[str]) -> list[Any]:
    """Return the rows' labels as the classes write them: without blanks around, by name, whole numbers as such."""
    values, names = text.rows[text.label][:], _names(text)
    if names and {*names} <= {*classes}:
        return [value if value is None else names[value] for value in values]
    found = {value: value for value in dict.fromkeys(values)}
    for value in found:
        if isinstance(value, str) and value not in classes:
            found[value] = value.strip()
        elif classes and isinstance(value, float) and value.is_integer():
            found[value] = int(value)
    return [found[value] for value in values]


def of_rows(text: Text) -> Labels:
    """Return the classes of a data set: its own names, else its texts or whole numbers, sorted; none of other numbers.

    Raises:
        ValueError: all rows have the same label, or -1 is one and may say that there is none.
    """
    found = sorted({value for value in _values(text, ()) if not is_missing(value)})
    if any(isinstance(value, float) for value in found):
        whole = all(float(value).is_integer() for value in found)
        if not whole or len(found) != 2:
            if whole:
                say(
                    f"column {text.label!r} of {text.name} has whole numbers with a decimal point, which are predicted "
                    "as numbers; write 1, not 1.0, to have classes"
                )
            return Labels(())
        found = [int(value) for value in found]
        say(f"column {text.label!r} of {text.name} has {found[0]}.0 and {found[1]}.0 only: these are two classes")
    classes = tuple(map(str, found))
    if len(classes) < 2:
        raise ValueError(
            f"column {text.label!r} of {text.name} has the label {', '.join(classes)} only, at least 2 are needed"
            if classes
            else f"column {text.label!r} of {text.name} has no label at all"
        )
    _check_classes(text, classes)
    return Labels(_names(text) or classes)


def _check_classes(text: Text, classes: Sequence[str]) -> None:
    """Say what looks alike, and refuse -1 beside 0: SNLI and GLUE write it where there is no label."""
    negative = [name for name in classes if name.startswith("-")]
    if "0" in classes and negative == ["-1"]:
        raise ValueError(
            f"column {text.label!r} of {text.name} has the label -1 beside {', '.join(classes[1:8])}; if it says that "
            "there is no label, leave these rows out, and if it is a class, write the classes as words"
        )
    given = {value for value in text.rows[text.label][:] if isinstance(value, str)}
    blanks = sorted(value for value in given if value not in classes and value.strip())
    if blanks:
        say(f"column {text.label!r} of {text.name} has labels with blanks around, as {blanks[0]!r}: they do not count")
    folded = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if folded[name.casefold()] > 1]:
        say(f"column {text.label!r} of {text.name} has classes that differ in case alone: {', '.join(alike[:8])}")


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
