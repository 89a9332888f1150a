"""How a setting is declared: a field of a dataclass that says what it is, which values it may have, and its default."""

import math
import os
from dataclasses import Field, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Range:
    """Valid values of a number.

    Args:
        low: the smallest value.
        high: the largest value; infinity itself is never valid.
        ends: whether `low` and `high` belong to the range, in the notation of intervals: "[]", "[)", "(]" or "()".
    """

    low: float
    high: float = math.inf
    ends: str = "[)"

    def __contains__(self, value: float) -> bool:
        from_low = value >= self.low if self.ends[0] == "[" else value > self.low
        to_high = value <= self.high if self.ends[1] == "]" else value < self.high
        return from_low and to_high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'at least' if self.ends[0] == '[' else 'above'} {self.low}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


POSITIVE = Range(0, ends="()")
BLOCKS = Range(1, 1_000_000, "[]")


METHOD, MUST_AGREE, IGNORED, FOLLOWS = "method", "must agree", "ignored", "follows"


def setting(
    help: str,
    default: Any = None,
    within: Range | None = None,
    *,
    choices: tuple[str, ...] | None = None,
    otherwise: str | None = None,
    bare: str | None = None,
    is_path: bool = False,
    may_change: bool = False,
    compared: str = METHOD,
    commands: tuple[str, ...] = (),
) -> Any:
    """Declare a field.

    Args:
        help: what it is, and its unit.
        default: the value of a field that is not given; None leaves it to `otherwise`.
        within: valid values of a number.
        choices: valid values of a string, where they are a closed set.
        otherwise: what happens where the value is None.
        bare: the value of a flag that is given without one; None where a value is needed.
        is_path: it may name a file or folder, so that a `~` in front stands for the home folder.
        may_change: a run that goes on may have another value than it began with.
        compared: what another value means where finished runs are compared: METHOD, another method; MUST_AGREE, no
            comparison; IGNORED, nothing; FOLLOWS, nothing of its own, since others decide it where it is not given.
        commands: the commands that have it beside prune.
    """
    metadata = {"help": help, "within": within, "choices": choices, "otherwise": otherwise, "bare": bare}
    nature = {"is_path": is_path, "may_change": may_change, "compared": compared, "commands": commands}
    return field(default=default, metadata=metadata | nature)


def describe(spec: Field[Any]) -> str:
    """Return the full sentence about a field: what it is; its range; its default."""
    default = spec.metadata["otherwise"] if spec.default is None else spec.default
    limits = [str(spec.metadata["within"])] if spec.metadata["within"] else []
    return "; ".join([spec.metadata["help"], *limits, f"default: {default}"])


def check_field(spec: Field[Any], value: Any) -> None:
    """Refuse a value that the field's declaration does not allow.

    Raises:
        ValueError: the value is None where there is a default, an empty string, not one of the choices or out of range.
    """
    within, choices = spec.metadata["within"], spec.metadata["choices"]
    if value is None:
        if spec.default is not None:
            raise ValueError(f"--{spec.name} has no value, leave it out to take its default, {spec.default}")
    elif within is not None and value not in within:
        raise ValueError(f"--{spec.name} {value} is out of range, it must be {within}")
    elif choices is not None and value not in choices:
        raise ValueError(f"--{spec.name} {value} is unknown, choose one of {', '.join(choices)}")
    elif value == "":
        raise ValueError(f'--{spec.name} "" is empty, give a value or leave it out')


class Settings:
    """Settings of one concern, checked when they are made."""

    def __post_init__(self) -> None:
        for spec in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, spec.name)
            check_field(spec, value)
            if value is not None and spec.metadata["is_path"]:
                object.__setattr__(self, spec.name, os.path.expanduser(value))
