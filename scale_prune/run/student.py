"""The model that learns and is pruned, with what makes its steps."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from scale_prune.config import EMBEDDING
from scale_prune.core import UnitGroup
from scale_prune.criteria import CRITERIA, freezes, observes
from scale_prune.criteria.base import members_of_shares
from scale_prune.data import Inputs
from scale_prune.export import plainest
from scale_prune.models import recompute_in_training, stored_groups
from scale_prune.pruning import DenseUnits, Pruner, carry_over, removes_components
from scale_prune.run.calibrating import whitening_roots
from scale_prune.system import Seconds
from scale_prune.tasks import Task
from scale_prune.zero3 import (
    FrozenEngine,
    Zero3Backend,
    check_maskable,
    compact_engine,
    give_back,
    inference_engine,
    load_model,
    num_parameters,
    prepare_units,
    reading,
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
        measured_dense: how good it was then, if weights are factorized and it is no checkpoint that goes on.
        dense: the units that it had then, and what earlier rounds have left of them.
        groups: its units; narrower ones once it is compacted, while the pruner remembers those it began with.
        engine: what trains it; another one once it is compacted.
        backend: the engine as pruning sees it.
        pruner: what scores and masks its units; another one after every round but the last.
        finished: whether all units that were to leave have left.
    """

    def __init__(self, inputs: Inputs, task: Task, *, factors: str) -> None:
        training, pruning = inputs.config.training, inputs.config.pruning
        model, self.measured_dense = _load_dense(inputs, task), None
        if removes_components(pruning) and factors != "zeros":
            with reading(model, inputs.ds_config) as backend:
                self.measured_dense = task.measure(backend.engine, thorough=True)
        if training.gradient_checkpointing:
            recompute_in_training(model)
        self._inputs = inputs
        self.generation_config = getattr(model, "generation_config", None)
        self.dense_parameters = num_parameters(model)
        self.groups = prepare_units(
            model,
            pruning,
            seed=training.seed,
            values=factors,
            token_counts=task.token_counts() if EMBEDDING in pruning.target_names else None,
            roots=whitening_roots(model, inputs, task) if factors == "whitened" else {},
        )
        if pruning.rounds:  # after which the groups go on counting in the dense model as they do now
            self.groups = tuple(replace(group, matrix_cost=group.dense_cost) for group in self.groups)
        self.dense, self.finished = DenseUnits(self.groups), False
        self._trainable = {name for name, param in model.named_parameters() if param.requires_grad}
        self.engine = self._engine_around(model, finished=False)
        self.backend = Zero3Backend(self.engine)
        if self.backend.trains:  # otherwise masks are there to stay
            check_maskable(self.engine.module, self.groups)
        self.pruner = self._make_pruner()

    @property
    def kind(self) -> str:
        """What is removed: "neuron", of which there are heads beside, "head" alone, or "component"."""
        return self.groups[0].kind

    @property
    def is_frozen(self) -> bool:
        """Whether the weights do not learn, but there are gradients."""
        return isinstance(self.engine, FrozenEngine)

    @property
    def stored(self) -> tuple[UnitGroup, ...]:
        """What a folder has to tell of the layers as they are."""
        return self.groups if self.kind == "component" else stored_groups(self.engine.module)

    @property
    def layout(self) -> str:
        """The layout of a folder that holds the model as it is."""
        return "per_layer" if self.kind == "component" else plainest(self._inputs.model_config, self.stored)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model as it is."""
        return num_parameters(self.engine.module)

    def go_on_with(self, kept: list[Tensor], scores: list[Tensor], seconds: Seconds) -> None:
        """Take out what earlier rounds have taken out; the weights will be a checkpoint's. A collective."""
        self.pruner.masking.put([mask.to(self.backend.device) for mask in kept])
        self.pruner.scoring.scores = [each.to(self.backend.device) for each in scores]
        self.compact(seconds, finished=False)

    def compact(self, seconds: Seconds, *, finished: bool) -> None:
        """Rebuild the engine around the units that are left; another pruner goes on with them, unless it is finished.

        A collective.
        """
        self.finished = finished
        if not self.pruner.pruning:
            return
        with seconds.measure("compaction"):
            trained = self._inputs.config.training.max_steps > 0 and not self.is_frozen
            self.engine, self.groups = compact_engine(
                self.backend,
                self.groups,
                self.pruner.masking.by_name,
                partial(self._engine_around, finished=finished),
                self.pruner.take_gates_off,
                anew=finished and not trained,
            )
            self.backend = Zero3Backend(self.engine)
            if not finished:
                before, self.pruner = self.pruner, self._make_pruner()
                self.dense.leave_to_next(before)
                carry_over(before, self.pruner)
            give_back()

    def let_go(self) -> None:
        """Free the memory of the engine; its model cannot be used any more. A collective."""
        release(self.engine)
        self.backend.let_go()  # where nothing was removed it is the pruner's too
        del self.engine, self.backend

    def _make_pruner(self) -> Pruner:
        config = self._inputs.config
        steps, seed = self._inputs.pruning_steps, config.training.seed
        return Pruner(self.backend, self.groups, config.pruning, total_steps=steps, seed=seed)

    def _engine_around(self, module: nn.Module, *, finished: bool) -> Any:
        """Build the engine that goes on: one that trains, one whose weights are frozen, or one that only reads."""
        training, pruning, ds_config = self._inputs.config.training, self._inputs.config.pruning, self._inputs.ds_config
        for name, param in module.named_parameters():
            param.requires_grad_(name in self._trainable)
        trains = training.max_steps > 0 and not freezes(pruning)
        if trains or (training.recovery_steps and (finished or pruning.remaining == 1)):
            return training_engine(module, ds_config)
        if not finished and (freezes(pruning) or observes(pruning, trains=trains)):
            members = members_of_shares(CRITERIA[pruning.criterion], self.groups)
            return FrozenEngine(module, ds_config, [member.name for member in members])
        return inference_engine(module, ds_config)


def _load_dense(inputs: Inputs, task: Task) -> PreTrainedModel:
    """Load the model as it was given; weights that it lacks, of a classifier, are drawn from the run's seed."""
    training = inputs.config.training
    set_seed(training.seed)
    return load_model(
        str(training.model),
        inputs.ds_config,
        trust_remote_code=training.trust_remote_code,
        config=task.model_config,
    )
