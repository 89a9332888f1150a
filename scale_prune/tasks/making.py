"""From the settings to a task."""

from collections.abc import Sequence

from scale_prune.config import CLASSIFICATION
from scale_prune.data import SPLITS, Inputs, Split
from scale_prune.tasks.classification import Classification
from scale_prune.tasks.language_modeling import LanguageModeling
from scale_prune.tasks.task import Task
from scale_prune.tasks.writing import Writing
from scale_prune.zero3 import Runtime


def make_task(inputs: Inputs, runtime: Runtime, splits: Sequence[Split] = SPLITS) -> Task:
    """Read and tokenize what a task needs. A collective.

    Args:
        inputs: the run's inputs.
        runtime: the ranks.
        splits: the parts of the data that are needed.

    Raises:
        ValueError: the data cannot be used.
    """
    name = inputs.config.task.task
    if name == CLASSIFICATION:
        return Classification(inputs, runtime, splits)
    return LanguageModeling(inputs, runtime, splits) if name == "lm" else Writing(inputs, runtime, splits)
