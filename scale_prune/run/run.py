"""One run: everything that its stages work with, built in the order in which ranks need it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from scale_prune.checkpoint import Checkpoint, check_model_and_text
from scale_prune.config import Config
from scale_prune.data import SELF, Inputs
from scale_prune.run.model_writer import ModelWriter
from scale_prune.run.monitor import Monitor
from scale_prune.run.output import open_output
from scale_prune.run.progress import Progress
from scale_prune.run.quality import Quality
from scale_prune.run.student import Student
from scale_prune.system import StopSignal
from scale_prune.tasks import Measured, Task
from scale_prune.zero3 import Runtime, Teacher


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What the functions of this room work with.

    Attributes:
        inputs: what the run reads.
        runtime: its ranks.
        task: what the student learns.
        stop: whether the scheduler wants the run to end.
        progress: steps, tokens and seconds so far.
        student: the model that is trained and pruned.
        teacher: the model whose logits it learns too, if there is one.
        writer: writes the student as a folder.
        monitor: where the run can be watched.
        quality: how good the student was at each stage.
    """

    inputs: Inputs
    runtime: Runtime
    task: Task
    stop: StopSignal
    progress: Progress
    student: Student
    teacher: Teacher | None
    writer: ModelWriter
    monitor: Monitor
    quality: Quality

    @property
    def config(self) -> Config:
        """The settings."""
        return self.inputs.config

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.config.output.output_dir)

    @property
    def last_step(self) -> int:
        """The last optimizer step, recovery included."""
        return self.config.training.max_steps + self.config.training.recovery_steps

    def measure(self, stage: str | None = None) -> None:
        """Measure the student on the validation data, under its engine as it is. A collective."""
        measured = self.quality.measure(self.student.engine, self.progress.step, stage)
        self.note(measured, stage, self.student.pruner.remaining)

    def note(self, measured: Measured, stage: str | None, remaining: float) -> None:
        """Add what was measured to the history."""
        told: dict[str, Any] = {"step": self.progress.step, "stage": stage, "perplexity": measured.perplexity}
        told |= {"metrics": measured.metrics, "remaining": remaining}
        self.progress.history.append(told)


def set_up(task: Task, runtime: Runtime, checkpoint: Checkpoint | None, stop: StopSignal) -> Run:
    """Load the models, start their engines, and open the output folder. A collective.

    Raises:
        ValueError: weights cannot be loaded or masked, the checkpoint is of another model or text, or the folder cannot
            be written.
    """
    inputs, progress = task.inputs, Progress()
    config = inputs.config
    student = Student(inputs, task, factors=config.pruning.factors if checkpoint is None else "zeros")
    teacher = _load_teacher(inputs)
    set_seed((config.training.seed + runtime.rank) % 2**32)  # numpy takes no larger one
    if checkpoint is not None:
        check_model_and_text(checkpoint, student.dense.groups, task.fingerprints)
    open_output(inputs, checkpoint, runtime)
    monitor = _monitor(config, active=runtime.is_main, steps_made=checkpoint.step if checkpoint else 0)
    return Run(
        inputs=inputs,
        runtime=runtime,
        task=task,
        stop=stop,
        progress=progress,
        student=student,
        teacher=teacher,
        writer=ModelWriter(inputs, student.generation_config, runtime),
        monitor=monitor,
        quality=Quality(task, monitor, progress.seconds),
    )


def _load_teacher(inputs: Inputs) -> Teacher | None:
    training, wanted = inputs.config.training, inputs.config.distillation.teacher
    if wanted is None:
        return None
    return Teacher(
        str(training.model if wanted == SELF else wanted),
        inputs.ds_config,
        trust_remote_code=training.trust_remote_code,
    )


def _monitor(config: Config, *, active: bool, steps_made: int) -> Monitor:
    output, training = config.output, config.training
    return Monitor(
        Path(output.output_dir) / "tensorboard" if output.tensorboard else None,
        total_steps=training.max_steps + training.recovery_steps,
        active=active,
        steps_made=steps_made,
    )
