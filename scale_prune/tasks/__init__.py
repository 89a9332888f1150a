"""What a model learns and how that is measured, one module a kind of task."""

from collections.abc import Sequence

from scale_prune.config import CLASSIFICATION
from scale_prune.inputs import Inputs
from scale_prune.rows import SPLITS, Split
from scale_prune.tasks.classification import Classification
from scale_prune.tasks.language_modelling import LanguageModelling
from scale_prune.tasks.task import Measured, MicroBatch, Step, Task
from scale_prune.tasks.writing import Writing
from scale_prune.zero3 import Runtime

__all__ = ["Measured", "MicroBatch", "Step", "Task", "make_task"]


def make_task(inputs: Inputs, runtime: Runtime, splits: Sequence[Split] = SPLITS) -> Task:
    """Read and tokenise what a task needs. A collective.

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
    return LanguageModelling(inputs, runtime, splits) if name == "lm" else Writing(inputs, runtime, splits)
