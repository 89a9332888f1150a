"""All that touches the package lm_eval, which is optional: imported only where `--lm_eval` is given.

Every rank loads the model whole and scores its share of a task's documents; rank 0 puts the scores together.
"""

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import AutoModelForCausalLM

from scale_prune.data import Inputs, with_bos
from scale_prune.tasks import neutral
from scale_prune.zero3 import Runtime, working_dtype

KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
RESAMPLES = 1000
"""Bootstrap draws behind the standard error of a metric that is no mean."""


class Tasks:
    """Tasks that are known and can be loaded.

    Args:
        names: of tasks, groups or tags.
        folder: with task files of one's own, or None.
        limit: how many documents of each task count, at least 1, or None for all.
        world_size: number of ranks.

    Raises:
        ValueError: a task is unknown, its file or data cannot be used, or it has fewer documents than there are ranks.
    """

    def __init__(self, names: Sequence[str], folder: str | None, limit: int | None, world_size: int) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are of defaults, and of our own model class
        self.names, self.limit = list(names), limit
        self.manager = _manager(names, None if folder is None else Path(folder))
        for name in names:
            _check_task(self.manager, name, limit, world_size)

    def measure(self, inputs: Inputs, runtime: Runtime) -> dict[str, Any]:
        """Score a model on all tasks. A collective.

        Returns:
            on rank 0 what lm_eval reports, by its own names: results, n-samples, versions ...; elsewhere nothing.
        """
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # forks of a member of the process group would not end well
        shared = _SharedModel(inputs, runtime)
        with neutral(shared.model):
            found = simple_evaluate(
                shared,
                tasks=self.names,
                limit=self.limit,
                task_manager=self.manager,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
            )
        return {key: found[key] for key in KEPT if key in found} if found else {}


class _SharedModel(HFLM):
    """A whole model on this rank's device, one of as many as there are ranks, each of which has its own documents."""

    def __init__(self, inputs: Inputs, runtime: Runtime) -> None:
        training = inputs.config.training
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(training.model), dtype=working_dtype(inputs.ds_config), trust_remote_code=training.trust_remote_code
        )
        tokenizer = with_bos(inputs.tokenizer, inputs.bos is not None)
        super().__init__(model.to(runtime.device), tokenizer=tokenizer, batch_size=inputs.micro_batch_size)
        self._runtime, self._rank, self._world_size = runtime, runtime.rank, runtime.world_size

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return a number of every rank; lm_eval counts requests by it."""
        return torch.tensor(self._runtime.gather_numbers(float(tensor)), dtype=tensor.dtype)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._runtime.barrier()


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """Return a manager that knows the tasks; lm_eval's own 14,000, which take 10 seconds, only where needed."""
    if folder is not None:
        local = TaskManager(include_path=folder, include_defaults=False)
        _check_folder(folder, local)
        if set(names) <= set(local.all_subtasks):
            return local
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        where = f"lm_eval and {folder}" if folder else "lm_eval, and no --lm_eval_include names a folder of task files"
        close = difflib.get_close_matches(unknown[0], manager.all_tasks)
        hint = f"near matches: {', '.join(close)}" if close else "`lm_eval ls tasks` lists its own"
        raise ValueError(f"--lm_eval {unknown[0]} is no task of {where}; {hint}")
    return manager


def _check_folder(folder: Path, manager: TaskManager) -> None:
    """Refuse a folder without task files, and files that cannot be read: lm_eval passes over them."""
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise ValueError(f"--lm_eval_include {folder} holds no task file, a *.yaml that names a task")
    for file in files:
        with _broken(f"--lm_eval_include {folder}", file):
            if _task_in(file) not in (None, *manager.all_tasks):
                manager.load([str(file)])


def _task_in(file: Path) -> str | None:
    """Return the task that a file names, None in a file that others include; its own tags are not looked at."""
    top = yaml.compose(file.read_text(encoding="utf-8"))
    keys = {key.value: value for key, value in top.value} if isinstance(top, yaml.MappingNode) else {}
    return keys["task"].value if isinstance(keys.get("task"), yaml.ScalarNode) else None


def _check_task(manager: TaskManager, name: str, limit: int | None, world_size: int) -> None:
    with _broken(f"--lm_eval {name}", manager.task_index[name].yaml_path):
        documents = {task: len(loaded.eval_docs) for task, loaded in manager.load([name])["tasks"].items()}
    for task, number in documents.items():
        if min(number, limit or number) < world_size:
            raise ValueError(
                f"--lm_eval {task} has {min(number, limit or number)} documents for {world_size} ranks, each of which "
                f"needs one; start fewer"
            )


@contextmanager
def _broken(flag: str, file: Path | None) -> Iterator[None]:
    """Name the task file in whatever goes wrong: a task is a program, whose mistakes have no bounds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{flag}: task file {file} cannot be used: {type(error).__name__}: {reason}") from error
