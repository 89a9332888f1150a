"""What levels cost in time: products with the matrices that a group keeps, measured on the machine of the run.

As for `--max_flops`, what is not a product with a matrix of weights, attention's softmax above all, is left out.
"""

import time
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from scale_prune.core import Member, UnitGroup
from scale_prune.models import full_shape
from scale_prune.run.run import Run
from scale_prune.zero3 import of_all_ranks

REPEATS = 5  # of which the fastest counts
Matrix = tuple[int, ...]  # features that are read, and made


def level_times(run: Run, kept: Sequence[Sequence[int]]) -> tuple[list[list[float]], float]:
    """Return the seconds of every group at its levels, and of all other matrices, as rank 0 has measured them.

    A collective of a few numbers. Read are `--block_size` tokens, in the working copy's dtype.

    Args:
        run: the run, before anything has left.
        kept: units at each level of each group.
    """
    groups, engine = run.student.groups, run.student.engine
    matrices = [[_matrices(group, level) for level in levels] for group, levels in zip(groups, kept, strict=True)]
    of_groups = {member.name for group in groups for member in group.members}
    others = [
        full_shape(module.weight)
        for name, module in engine.module.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" not in of_groups
    ]
    seconds: dict[Matrix, float] = {}
    if run.runtime.is_main:
        dtype = next(engine.module.parameters()).dtype
        for matrix in {*others, *(matrix for own in matrices for level in own for matrix in level)}:
            seconds[matrix] = _seconds(matrix, run.config.data.block_size, dtype, engine.device)
    seconds = of_all_ranks(seconds)[0]

    def spent(some: Iterable[Matrix]) -> float:
        return sum(seconds[matrix] for matrix in some)

    return [[spent(level) for level in own] for own in matrices], spent(others)


def _matrices(group: UnitGroup, kept: int) -> list[Matrix]:
    return [_narrowed(member, kept) for member in group.members if len(member.shape) == 2]


def _narrowed(member: Member, kept: int) -> Matrix:
    units, others = member.pieces * member.block * kept, member.shape[1 - member.dim]
    return (units, others) if member.role == "out" else (others, units)


def _seconds(matrix: Matrix, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    inputs, weight = (
        torch.ones(tokens, matrix[0], dtype=dtype, device=device),
        torch.ones(matrix, dtype=dtype, device=device),
    )
    found = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        float((inputs @ weight)[0, 0])  # a number that has to be there
        found.append(time.perf_counter() - started)
    return min(found[1:])
