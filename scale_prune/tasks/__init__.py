"""What a model learns and how that is measured, one module a kind of task."""

from scale_prune.tasks.generation import neutral
from scale_prune.tasks.labels import of_rows
from scale_prune.tasks.making import make_task
from scale_prune.tasks.task import Measured, MicroBatch, Step, Task
from scale_prune.tasks.writing import check_positions, questions_of
