"""Short names for what tells runs apart."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings whose values are not the same in all runs, in their order; an absent one counts as None."""
    names = dict.fromkeys(name for run in runs for name in run)
    return [name for name in names if len({run.get(name) for run in runs}) > 1]


def short(values: Iterable[Hashable]) -> dict[Hashable, str]:
    """Return the texts of one setting's values: of paths the last part, where that tells them apart."""
    different = list(dict.fromkeys(values))
    brief = {value: _brief(value) for value in different}
    return brief if len(set(brief.values())) == len(different) else {value: str(value) for value in different}


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return Path(value).name or value
    return str(value).lower()
