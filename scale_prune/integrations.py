"""Pruning in loops that accelerate runs: one line for Hugging Face's `Trainer`, one for an accelerate loop."""

import json
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from scale_prune.api import attach, compact, prepare, save
from scale_prune.checkpoint import STATE, load_state, save_state
from scale_prune.config import PruningConfig
from scale_prune.pruning import Pruner
from scale_prune.system import check_new
from scale_prune.zero3 import told_to_all


def follow(engine: Any, config: PruningConfig, *, total_steps: int, seed: int = 0) -> Pruner:
    """Attach a pruner that follows the engine's own steps: `attach`, without calls in the loop.

    For `accelerator.backward`, which calls `engine.backward` and `engine.step` at once and leaves no place between.

    Args:
        engine: what `accelerator.prepare` returns for the model.
        config: as for `attach`.
        total_steps: as for `attach`.
        seed: as for `attach`.

    Returns:
        The pruner, for `compact`, `save_state` and `load_state`.

    Raises:
        ValueError: as `attach`.
    """
    pruner = attach(engine, config, total_steps=total_steps, seed=seed)
    step = engine.step

    @wraps(step)
    def step_and_prune(*args: Any, **kwargs: Any) -> Any:
        pruner.after_backward()
        result = step(*args, **kwargs)
        pruner.after_step()
        return result

    engine.step = step_and_prune
    return pruner


class PruningCallback(TrainerCallback):
    """Prune while a `Trainer` trains, and write the pruned model at the end of `trainer.train()`.

    The line is `trainer.add_callback(PruningCallback(trainer, config))`, on all ranks, before `trainer.train()`. The
    Trainer's engine is taken apart at the end: the folder is the result, `trainer.save_model` has nothing to save.
    The Trainer's checkpoints hold the pruner too, so `resume_from_checkpoint` works within its `output_dir`.

    Args:
        trainer: of `transformers`, or one derived from it, with ZeRO-3 in `TrainingArguments(deepspeed=...)`.
        config: what is pruned, how far and how fast.
        folder: a new or empty folder for the pruned model; `pruned` in the Trainer's `output_dir` if left out.

    Attributes:
        pruner: from the beginning of training on.

    Raises:
        ValueError: the Trainer does not run ZeRO-3, is to load another checkpoint at the end, or the folder holds
            something or is a mount point.
    """

    pruner: Pruner

    def __init__(self, trainer: Any, config: PruningConfig, folder: str | PathLike[str] | None = None) -> None:
        self.trainer, self.config = trainer, config
        self.folder = Path(folder or Path(trainer.args.output_dir, "pruned"))
        plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or plugin.zero_stage != 3:
            stage = f"ZeRO stage {plugin.zero_stage}" if plugin else "no DeepSpeed"
            raise ValueError(f"the Trainer runs {stage}; pruning needs stage 3 in TrainingArguments(deepspeed=...)")
        if trainer.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end would load weights that were trained under other masks; leave it out: the "
                "pruned model is that of the last step"
            )
        check_new(self.folder)
        prepare(trainer.model, config, seed=trainer.args.seed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the pruner, and give it its state back where the Trainer resumes.

        Raises:
            ValueError: the Trainer resumes from a checkpoint that is not in its `output_dir`, or has no pruner's state;
                the folder holds something by now; or as `attach` and `load_state`.
        """
        checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        with told_to_all(self.folder):
            check_new(self.folder)
        with told_to_all(checkpoint, "gone on from"):
            if state.global_step and not _is_of(checkpoint, state):
                raise ValueError(
                    f"it holds no {STATE}, or is not what the Trainer has loaded; resume from a checkpoint in its "
                    "output_dir that was written with PruningCallback"
                )
        engine = self.trainer.model_wrapped
        self.pruner = follow(engine, self.config, total_steps=state.max_steps, seed=args.seed)
        save_checkpoint = engine.save_checkpoint

        @wraps(save_checkpoint)
        def save_both(folder: str, *more: Any, **options: Any) -> Any:
            result = save_checkpoint(folder, *more, **options)
            save_state(self.pruner, folder)
            return result

        engine.save_checkpoint = save_both  # the Trainer removes older checkpoints before it calls `on_save`
        if state.global_step:
            load_state(self.pruner, checkpoint)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the pruner how many passes the step has: fewer at the end of an epoch, where the Trainer knows."""
        self.pruner.backend.accumulation_steps = self.trainer.current_gradient_accumulation_steps

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the masked units for good and write the model, with the tokenizer if the Trainer has one."""
        tokenizer = kwargs.get("processing_class")
        engine = compact(self.pruner)
        save(engine, self.folder, tokenizer=tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None)


def _is_of(checkpoint: Path, state: TrainerState) -> bool:
    """Tell whether a checkpoint has a pruner's state, and is the one that the Trainer has read its own from.

    The Trainer does not say which that was; what it has logged until then, if anything, is another in another run.
    """
    file = checkpoint / TRAINER_STATE_NAME
    if not ((checkpoint / STATE).exists() and file.exists()):
        return False
    return json.dumps(TrainerState.load_from_json(str(file)).log_history) == json.dumps(state.log_history)
