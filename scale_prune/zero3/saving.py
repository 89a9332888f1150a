"""A model on its way from shards into a folder; all ranks write."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from safetensors import SafetensorError

from scale_prune.export import Export
from scale_prune.system import complete_or_absent
from scale_prune.zero3.backend import Zero3Backend


def write_model(backend: Zero3Backend, export: Export, folder: Path, *, replace: bool = False, **options: Any) -> None:
    """Write a model as a Hugging Face folder. A collective; the folder is there for all ranks when it returns.

    One tensor at a time is gathered, and every rank receives it. The ranks that see rank 0's disk write the files of
    weights by turns, one each at a time: no file has two writers, which NFS does not stand.

    Args:
        backend: of an engine around the compacted model.
        export: what becomes of it.
        folder: as for `Export.write`.
        replace: as for `Export.write`.
        options: `max_file_bytes` of `Export.write_weights`.

    Raises:
        ValueError: on all ranks, what keeps one of them from writing.
    """
    with ExitStack() as stack:
        partial = Path()
        with told_to_all(folder):
            if backend.rank == 0:
                partial = stack.enter_context(complete_or_absent(folder, replace=replace))
        partial = of_all_ranks(partial)[0]
        writers = [rank for rank, sees in enumerate(of_all_ranks(partial.is_dir())) if sees]
        tensors = backend.named_tensors()
        with told_to_all(folder):
            try:
                portions = export.write_weights(
                    partial, tensors, writes=lambda number: writers[number % len(writers)] == backend.rank, **options
                )
            finally:
                for _ in tensors:  # where it failed, the other ranks gather them to the end
                    pass
        with told_to_all(folder):
            if backend.rank == 0:
                export.write_beside(partial, portions)
                stack.close()


@contextmanager
def told_to_all(path: Path, what: str = "written") -> Iterator[None]:
    """Raise on all ranks what keeps one of them from writing, or from what else is said. A collective.

    Raises:
        ValueError: it.
    """
    problem = ""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        problem = f"{path} cannot be {what}: {error}"
    if problems := list(filter(None, of_all_ranks(problem))):
        raise ValueError(problems[0])


def of_all_ranks(value: Any) -> list[Any]:
    """Return a small object of every rank, in order of rank. A collective."""
    values: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
