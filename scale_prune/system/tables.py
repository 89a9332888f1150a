"""Tables in Markdown, which is read as it is printed and shown as a table where it is rendered."""

from collections.abc import Iterable, Iterator, Sequence


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
