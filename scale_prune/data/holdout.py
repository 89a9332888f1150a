"""Which rows are held out for validation where no validation data is given: always the same ones of the same data."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

HELD_OUT = 0.05
SEED = 0
"""Not the run's: runs of different seeds are compared, and other commands measure on the same rows."""
RUNS, LINES = 400, 10
FEW = 20


def neighbors(num_rows: int, *, lines: bool) -> tuple[np.ndarray, str]:
    """Choose runs of neighboring rows, spread over the data at random.

    What stands together belongs together: the lines of a text, the references of a prompt. So the rows are cut into 400
    runs, of which 5 % are chosen; few rows into fewer, so that a run of lines has 10 of them where it can.

    Args:
        num_rows: how many rows there are.
        lines: the rows are lines of one text.

    Returns:
        the numbers of the chosen rows, in order, and a description.
    """
    num_runs = min(num_rows, RUNS, max(round(1 / HELD_OUT), num_rows // LINES)) if lines else min(num_rows, RUNS)
    drawn = _random().permutation(num_runs)[: max(1, round(num_runs * HELD_OUT))]
    runs = [np.arange(num_rows * run // num_runs, num_rows * (run + 1) // num_runs) for run in np.sort(drawn)]
    return np.concatenate([np.arange(0), *runs]), f"{len(runs)} runs of neighboring rows, drawn at random"


def stratified(labels: Sequence[Any]) -> tuple[np.ndarray, str]:
    """Choose 5 % of the rows of every label, at least one where a label has two; of numbers, of all rows.

    Returns:
        the numbers of the chosen rows, in order, and a description.
    """
    kinds = np.unique([str(label).strip() for label in labels], return_inverse=True)[1]
    if any(isinstance(label, float) for label in labels) and max(kinds) >= FEW:
        kinds = np.zeros_like(kinds)
    drawn = _random().permutation(len(labels))
    drawn = drawn[np.argsort(kinds[drawn], kind="stable")]
    ends = np.cumsum([0, *np.bincount(kinds)])
    parts = [drawn[first : first + _share(last - first)] for first, last in pairwise(ends)]
    alone = sum(not len(part) for part in parts)
    without = f"; {alone} labels have one row only, which is left for training" if alone else ""
    each = f" from each of {len(parts)} labels by its share" if len(parts) > 1 else ""
    return np.sort(np.concatenate(parts)), f"drawn at random{each}{without}"


def _share(num_rows: int) -> int:
    return max(round(num_rows * HELD_OUT), min(1, num_rows - 1))


def _random() -> np.random.RandomState:
    return np.random.RandomState(SEED)  # unlike those of default_rng, its numbers never change with numpy's version
