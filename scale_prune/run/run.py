"""One run: a model, its engine and its pruner, from the first step to the re-loaded export."""

import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from scale_prune.checkpoint import (
    Checkpoint,
    check_model_and_text,
    restore_engine,
    restore_pruner,
    restore_randomness,
    save_run,
)
from scale_prune.data import SELF, Inputs
from scale_prune.models import cluster_sizes
from scale_prune.pruning import Pruner
from scale_prune.run.model_writer import ModelWriter
from scale_prune.run.monitor import Monitor
from scale_prune.run.output import open_output
from scale_prune.run.quality import Quality
from scale_prune.run.report import tenths, write_kept
from scale_prune.system import STOPPED, Seconds, StopSignal, versions
from scale_prune.tasks import MicroBatch, Step, Task
from scale_prune.zero3 import (
    Runtime,
    Teacher,
    Zero3Backend,
    compact_engine,
    inference_engine,
    load_model,
    num_parameters,
    precision,
    prepare_units,
    random_state,
    release,
    set_random_state,
    training_engine,
)


class Run:
    """One fine-tuning run and its engine."""

    def __init__(
        self,
        inputs: Inputs,
        runtime: Runtime,
        task: Task,
        checkpoint: Checkpoint | None,
        stop: StopSignal,
    ) -> None:
        self.inputs, self.config, self.runtime = inputs, inputs.config, runtime
        self.task, self.checkpoint, self.stop = task, checkpoint, stop
        self.folder = Path(self.config.output.output_dir)
        self.step = 0
        self.tokens = 0
        self.step_seconds: list[float] = []
        self.started = time.monotonic()
        self.seconds = Seconds()
        self.stopping = False
        self.resumed_at: list[int] = []
        training = self.config.training
        model = self._load()
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.writer = ModelWriter(inputs, getattr(model, "generation_config", None), runtime)
        self.dense_parameters = num_parameters(model)
        self.groups = prepare_units(
            model,
            self.config.pruning,
            seed=training.seed,
            values=self.config.pruning.factors if checkpoint is None else "zeros",
            token_counts=task.token_counts(),
        )
        self.engine = self._make_engine(model)
        self.backend = Zero3Backend(self.engine)
        self.backend.check(self.groups)
        self.pruner = Pruner(
            self.backend, self.groups, self.config.pruning, total_steps=training.max_steps, seed=training.seed
        )
        self.teacher = self._load_teacher()
        set_seed((training.seed + runtime.rank) % 2**32)  # numpy takes no larger one
        if checkpoint is not None:
            check_model_and_text(checkpoint, self.pruner, task.fingerprints)
        open_output(self.config, checkpoint, runtime)
        events = self.folder / "tensorboard" if self.config.output.tensorboard else None
        self.monitor = Monitor(
            events,
            total_steps=training.max_steps + training.recovery_steps,
            active=runtime.is_main,
            steps_made=checkpoint.step if checkpoint else 0,
        )
        self.quality = Quality(task, self.monitor)

    def go(self) -> dict[str, Any]:
        """Train, prune, compact, export and measure, from the start or from the checkpoint; return the report.

        Raises:
            SystemExit: the run was told to stop, and is saved; with the code STOPPED.
        """
        training = self.config.training
        if self.checkpoint is None:
            self._measure_start()
        else:
            self._go_on_from(self.checkpoint)
        steps = self.task.steps(self.engine.gradient_accumulation_steps(), self.step)
        pruned_at, last = self.pruner.schedule.last_pruning_step, training.max_steps + training.recovery_steps
        if self.step <= pruned_at:
            self._train(steps, pruned_at)
            self._evaluate("masked")
            self._compact()
            self._evaluate("compacted")
        if pruned_at < last:
            self._train(steps, last)
            self._evaluate("recovered")
        pruned_parameters = num_parameters(self.engine.module)
        self._export()
        stored_parameters = self._reload()
        return self._report(self.dense_parameters, pruned_parameters, stored_parameters)

    def _load(self) -> PreTrainedModel:
        """Load the model as it was given; weights that it lacks, of a classifier, are drawn from the run's seed."""
        training = self.config.training
        set_seed(training.seed)
        return load_model(
            str(training.model),
            self.inputs.ds_config,
            trust_remote_code=training.trust_remote_code,
            config=self.task.model_config,
        )

    def _load_teacher(self) -> Teacher | None:
        training, wanted = self.config.training, self.config.distillation.teacher
        if wanted is None:
            return None
        return Teacher(
            str(training.model if wanted == SELF else wanted),
            self.inputs.ds_config,
            trust_remote_code=training.trust_remote_code,
        )

    # --- going on --------------------------------------------------------------------------------------------

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        """Bring everything to where it was after the checkpoint's step."""
        measured = checkpoint.state["measured"]
        self.step = checkpoint.step
        self.resumed_at = [*measured["resumed_at"], self.step]
        self.started -= measured["total_seconds"]
        self.seconds.update(measured["seconds"])
        self.tokens = measured.get("tokens", self.step * self.inputs.batch_size * self.config.data.block_size)
        self.step_seconds = [*measured.get("step_seconds", [])]
        self.quality.restore(measured)
        restore_pruner(checkpoint, self.pruner)
        self.pruner.seconds.update(measured["pruner_seconds"])
        if checkpoint.compacted:
            self._compact()
        restore_engine(checkpoint, self.backend)
        if not checkpoint.compacted:
            self.pruner.put_masks_on()
        restore_randomness(checkpoint, self.runtime, self.config.training.seed)
        self.monitor.say(f"going on after step {self.step}, from {checkpoint.folder}")

    def _save(self) -> None:
        with self.seconds.measure("checkpoints"):
            folder = save_run(
                self.inputs,
                self.runtime,
                self.backend,
                self.pruner,
                step=self.step,
                texts=self.task.fingerprints,
                measured={
                    "total_seconds": time.monotonic() - self.started,
                    "seconds": dict(self.seconds),
                    "pruner_seconds": dict(self.pruner.seconds),
                    "tokens": self.tokens,
                    "step_seconds": self.step_seconds,
                    **self.quality.state(),
                    "resumed_at": self.resumed_at,
                },
            )
        self.monitor.say(f"step {self.step}: saved {folder}")

    # --- training --------------------------------------------------------------------------------------------

    def _train(self, steps: Iterator[Step], last: int) -> None:
        self.engine.train()
        every, started, first = self.config.output.eval_every, time.monotonic(), self.step + 1
        tokens_before = self.tokens
        for step in range(first, last + 1):
            batch, begun = next(steps), time.monotonic()
            loss = self._step(batch.micro_batches, step)
            self.step_seconds.append(time.monotonic() - begun)
            self.step, self.tokens = step, self.tokens + batch.tokens
            rate = (self.tokens - tokens_before) / (time.monotonic() - started)
            self.monitor.progress(step, loss=loss, remaining=self.pruner.remaining, tokens_per_second=rate)
            if step % self.config.output.log_every == 0 or step == last:
                self._log(step, loss, rate)
            if every and step % every == 0 and step < last:
                self._evaluate(None)
                self.engine.train()
            self._save_if_due()

    def _save_if_due(self) -> None:
        every = self.config.checkpoint.save_every
        if self.stopping or (every and self.step % every == 0):
            self._save()
        if self.stopping:
            self.monitor.say(f"stopped by SIGTERM after step {self.step}; the same command with --resume goes on")
            raise SystemExit(STOPPED)

    def _step(self, micro_batches: list[MicroBatch], step: int) -> float:
        """Make one optimizer step and return the loss of the global batch before it."""
        pruning = step <= self.pruner.schedule.last_pruning_step  # afterwards the masked units are gone
        total = torch.zeros((), dtype=torch.float64)
        for index, micro_batch in enumerate(micro_batches, 1):
            inputs = micro_batch.to(self.runtime.device)
            taught = self._taught(inputs)
            with self.seconds.measure("forward_backward"):
                loss = self._loss(inputs, taught) * micro_batch.weight
                self.engine.backward(loss)
                total += loss.detach().double().cpu()
            if pruning:
                self.pruner.after_backward()
            if index == len(micro_batches):
                mean = self._checked_loss(float(total) / len(micro_batches), step)
            with self.seconds.measure("step"):
                self.engine.step()
            if pruning:
                self.pruner.after_step()
        return mean

    def _taught(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Return the teacher's logits, None where there is no teacher."""
        if self.teacher is None:
            return None
        with self.seconds.measure("teacher"):
            return self.teacher.logits({**inputs, **self.task.options, "labels": None})

    def _loss(self, inputs: dict[str, torch.Tensor], taught: torch.Tensor | None) -> torch.Tensor:
        """Return the loss of a micro batch: of the labels, and where there is a teacher, of its logits too."""
        output = self.engine(**inputs, **self.task.options)
        loss: torch.Tensor = output.loss
        if self.teacher is None or taught is None:
            return loss
        alpha = self.config.distillation.distill_alpha
        temperature = self.config.distillation.distill_temperature
        return (1 - alpha) * loss + alpha * self.task.divergence(output.logits, taught, inputs["labels"], temperature)

    def _checked_loss(self, own: float, step: int) -> float:
        """Return the ranks' mean loss; stop before a loss or gradient that is not finite reaches the weights.

        In fp16 the loss scaler skips such steps.

        Raises:
            ValueError: the loss or a gradient is not finite.
        """
        own_numbers = [own, float(not self.backend.gradients_finite()), float(self.stop.received)]
        sums = self.runtime.add_over_ranks(torch.tensor(own_numbers, dtype=torch.float64))
        total, num_broken, num_stopping = sums.tolist()
        self.stopping = num_stopping > 0
        loss = total / self.runtime.world_size
        if self.engine.fp16_enabled() or (math.isfinite(loss) and not num_broken):
            return loss
        layout = "uniform" if self.uniform else "per_layer"
        last_good = self.writer.write("last_good", self.backend, self.groups, layout)
        what = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        raise ValueError(
            f"{what} at step {step}; the model as it was before that step is in "
            f"{last_good}; try a smaller --learning_rate than {self.config.training.learning_rate}"
        )

    def _log(self, step: int, loss: float, tokens_per_second: float) -> None:
        pruner, parts = self.pruner, {**self.seconds, **self.pruner.seconds}
        values = {
            "train/loss": loss,
            "train/learning_rate": self.engine.get_lr()[0],
            "train/tokens_per_second": tokens_per_second,
            "pruning/score_learning_rate": self.config.pruning.score_learning_rate
            * pruner.schedule.learning_rate(step),
            "pruning/remaining_target": pruner.schedule.remaining(step),
            "pruning/remaining": pruner.remaining,
            "pruning/mask_churn": pruner.churn,
        }
        similarity = self.pruner.mean_similarity()
        if similarity is not None:
            values["pruning/similarity"] = similarity
        if pruner.gating is not None:
            values["pruning/remaining_by_gates"] = pruner.gating.expected
        values |= {f"seconds/{part}": seconds / step for part, seconds in parts.items()}
        self.monitor.scalars(step, values)
        self.monitor.layers(step, masks=pruner.masks, scores=pruner.scores)

    # --- measuring -------------------------------------------------------------------------------------------

    def _evaluate(self, name: str | None) -> None:
        """Measure the model on the validation data, under the engine as it is."""
        with self.seconds.measure("evaluation"):
            self.quality.measure(self.engine, self.step, name)

    def _measure_start(self) -> None:
        """Measure the dense model, and the one that training starts from, if its weights are factorised."""
        if self.groups[0].kind == "neuron":
            self._evaluate("dense")
            return
        randomness = random_state()
        dense = inference_engine(self._load(), self.inputs.ds_config)
        set_random_state(randomness)
        with self.seconds.measure("evaluation"):
            self.quality.measure(dense, self.step, "dense")
        dense.empty_partition_cache()
        release(dense)
        self._evaluate("factorized")

    # --- the smaller model -----------------------------------------------------------------------------------

    @property
    def uniform(self) -> bool:
        """True where all layers have the same width."""
        return len({group.num_units for group in self.groups}) == 1

    def _compact(self) -> None:
        """Rebuild the engine around the units that are left."""
        if not self.pruner.pruning:
            return
        with self.seconds.measure("compaction"):
            gates = self.pruner.take_gates_off()
            self.engine, self.groups = compact_engine(
                self.backend, self.groups, self.pruner.masks_by_name, self._make_engine, gates
            )
            self.backend = Zero3Backend(self.engine)

    def _make_engine(self, module: torch.nn.Module) -> Any:
        return training_engine(module, self.inputs.ds_config)

    def _export(self) -> None:
        with self.seconds.measure("export"):
            if self.runtime.is_main:
                write_kept(self.folder, self.pruner.groups, self.pruner.masks, self.pruner.scores)
            self.writer.write("pruned", self.backend, self.groups, str(self.config.output.layout))

    def _reload(self) -> int:
        """Load the exported folder as a user would, measure it, and return the number of parameters it stores.

        Raises:
            RuntimeError: it is not as good as the model it was written from.
        """
        release(self.engine)
        if self.teacher is not None:
            self.teacher.let_go()
        del self.engine, self.backend, self.pruner.backend
        gc.collect()
        folder = self.folder / "pruned"
        # The code of a per_layer folder is ours; a base model's own code runs only where the user trusts it.
        trusted = self.config.output.layout == "per_layer" or self.config.training.trust_remote_code
        model = load_model(str(folder), self.inputs.ds_config, trust_remote_code=trusted)
        self.engine = inference_engine(model, self.inputs.ds_config)
        self._evaluate("exported")
        self.quality.check_exported(folder)
        if self.runtime.is_main:
            self.quality.write_generations(self.folder)
        return num_parameters(model)

    def _report(self, dense: int, pruned: int, stored: int) -> dict[str, Any]:
        config, pruner = self.config, self.pruner
        settings = config.flat()
        return {
            **{name: settings[name] for name in ("model", "criterion", "scope", "layout", "seed")},
            "dataset": settings["dataset"] or settings["train_file"],
            "validation": self.inputs.validation,
            "world_size": self.runtime.world_size,
            "steps": config.training.max_steps + config.training.recovery_steps,
            "remaining": {
                "target": config.pruning.remaining,
                "measured": pruner.remaining,
                "gates": pruner.gating.expected if pruner.gating is not None else None,
            },
            "unit": self.groups[0].kind,
            "widths": pruner.widths,
            "parameters": {"dense": dense, "pruned": pruned, "stored": stored},
            "task": config.task.task,
            "bos": self.inputs.begins_with_bos,
            "perplexity": {"recovered": None, **self.quality.perplexities},
            "metrics": self.quality.metrics,
            "dropped_examples": dict(self.task.dropped),
            "seconds": {"total": time.monotonic() - self.started, **self.seconds, **pruner.seconds},
            "embedding": cluster_sizes(pruner.groups, pruner.widths),
            "step_seconds": tenths(self.step_seconds),
            "resumed_at": self.resumed_at,
            "distillation": self._teachers_cost(),
            "tokens": self.tokens,
            "peak_memory_bytes": self.runtime.peak_memory(),
            "settings": settings,
            "ds_config": self.inputs.ds_config,
            "versions": versions(),
        }

    def _teachers_cost(self) -> dict[str, Any] | None:
        """Return what the teacher cost: seconds of this rank, and bytes of every rank."""
        if self.teacher is None:
            return None
        bytes_each = precision(self.inputs.ds_config).itemsize
        return {
            "teacher": self.config.distillation.teacher,
            "parameters": self.teacher.num_parameters,
            "bytes_per_rank": -(-self.teacher.num_parameters // self.runtime.world_size) * bytes_each,
            "seconds": self.seconds["teacher"],
        }
