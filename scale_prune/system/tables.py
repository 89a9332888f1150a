"""Results as text: tables in Markdown, read as they are printed and shown where they are rendered; and JSON."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> Iterator[str]:
    """Yield the lines of a table.

    Args:
        columns: their names.
        rows: the cells of each row, as many as there are columns.
        texts: how many columns from the first on are aligned to the left; the others, of numbers, to the right.
    """
    yield f"| {' | '.join(columns)} |"
    yield "|---" * texts + "|---:" * (len(columns) - texts) + "|"
    yield from (f"| {' | '.join(cells)} |" for cells in rows)


def json_text(values: Any) -> str:
    """Return values as JSON; a number that is not finite is null, since JSON knows neither infinity nor NaN."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
