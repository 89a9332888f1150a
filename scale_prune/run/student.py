"""The model that learns and is pruned, with what makes its steps."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from scale_prune.data import Inputs
from scale_prune.pruning import Pruner
from scale_prune.system import Seconds
from scale_prune.tasks import Task
from scale_prune.zero3 import (
    Zero3Backend,
    check_maskable,
    compact_engine,
    load_model,
    num_parameters,
    prepare_units,
    release,
    training_engine,
)


class Student:
    """A model under its engine, and its pruner. Building one is a collective.

    Args:
        inputs: the run's inputs.
        task: what the model learns.
        factors: values of factorized weights, see `prepare_units`.

    Attributes:
        generation_config: of the model as it was loaded, if it has one.
        dense_parameters: how many it had then.
        groups: its units; narrower ones once it is compacted, while the pruner remembers those it began with.
        engine: what trains it; another one once it is compacted.
        backend: the engine as pruning sees it.
        pruner: what scores and masks its units.
    """

    def __init__(self, inputs: Inputs, task: Task, *, factors: str) -> None:
        training, pruning = inputs.config.training, inputs.config.pruning
        model = load_dense(inputs, task)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._ds_config = inputs.ds_config
        self.generation_config = getattr(model, "generation_config", None)
        self.dense_parameters = num_parameters(model)
        self.groups = prepare_units(
            model, pruning, seed=training.seed, values=factors, token_counts=task.token_counts()
        )
        self.engine = self._make_engine(model)
        self.backend = Zero3Backend(self.engine)
        check_maskable(self.engine.module, self.groups)
        self.pruner = Pruner(self.backend, self.groups, pruning, total_steps=training.max_steps, seed=training.seed)

    @property
    def kind(self) -> str:
        """What is removed: "neuron" or "component"."""
        return self.groups[0].kind

    @property
    def layout(self) -> str:
        """The layout of a folder that holds the model as it is."""
        return "uniform" if len({group.num_units for group in self.groups}) == 1 else "per_layer"

    @property
    def num_parameters(self) -> int:
        """Parameters of the model as it is."""
        return num_parameters(self.engine.module)

    def compact(self, seconds: Seconds) -> None:
        """Rebuild the engine around the units that are left. A collective."""
        if not self.pruner.pruning:
            return
        with seconds.measure("compaction"):
            gates = self.pruner.take_gates_off()
            masks = self.pruner.masking.by_name
            self.engine, self.groups = compact_engine(self.backend, self.groups, masks, self._make_engine, gates)
            self.backend = Zero3Backend(self.engine)

    def let_go(self) -> None:
        """Free the memory of the engine; its model cannot be used any more. A collective."""
        release(self.engine)
        self.backend.let_go()  # where nothing was removed it is the pruner's too
        del self.engine, self.backend

    def _make_engine(self, module: nn.Module) -> Any:
        return training_engine(module, self._ds_config)


def load_dense(inputs: Inputs, task: Task) -> PreTrainedModel:
    """Load the model as it was given; weights that it lacks, of a classifier, are drawn from the run's seed."""
    training = inputs.config.training
    set_seed(training.seed)
    return load_model(
        str(training.model),
        inputs.ds_config,
        trust_remote_code=training.trust_remote_code,
        config=task.model_config,
    )
