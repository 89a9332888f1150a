"""What may change when a run goes on, and what may not."""

from scale_prune.checkpoint import Checkpoint
from scale_prune.config import Config, get
from scale_prune.criteria import schedule_of
from scale_prune.data import Inputs

MAY_CHANGE = frozenset(
    # where things are: the text's tokens are compared, not its path
    {"model", "dataset", "dataset_config", "train_file", "validation_file", "output_dir", "overwrite"}
    # how the steps are cut up: the global batch is compared
    | {"ds_config", "train_batch_size", "micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
    # how long, how fast, what is written
    | {"max_steps", "recovery_steps", "learning_rate", "weight_decay", "lr_warmup_fraction", "max_grad_norm"}
    | {"eval_every", "log_every", "tensorboard", "layout", "collective_timeout", "trust_remote_code", "plugin"}
    | {"save_every", "keep_checkpoints", "resume", "generation_batch_size"}
)


FIXED_IN_DS_CONFIG = ("train_batch_size", "optimizer.type", "scheduler.type", "bf16.enabled", "fp16.enabled")


def check_same(checkpoint: Checkpoint, inputs: Inputs) -> list[str]:
    """Refuse settings under which the run would not be the same one.

    Returns:
        A line for every other setting that has changed.

    Raises:
        ValueError: a setting that must not change has changed, or the run is past the steps that are asked for.
    """
    before, now = checkpoint.state["settings"], inputs.config.flat()
    changed = [name for name in now if name in before and now[name] != before[name]]
    for name in changed:
        if name not in MAY_CHANGE:
            raise ValueError(
                f"--{name} {now[name]} is not the run's {before[name]}, which cannot change on the way; "
                f"leave it as it was, or start another run"
            )
    for path in FIXED_IN_DS_CONFIG:
        old, new = get(checkpoint.state["ds_config"], path), get(inputs.ds_config, path)
        if old != new:
            raise ValueError(
                f'the ds_config has "{path}": {new}, but the run has {old}, which cannot change on the way'
            )
    _check_steps(checkpoint, inputs.config)
    return [f"--{name} is now {now[name]}, was {before[name]}" for name in changed if name != "resume"]


def _check_steps(checkpoint: Checkpoint, config: Config) -> None:
    max_steps, total = config.training.max_steps, config.training.max_steps + config.training.recovery_steps
    before = checkpoint.state["settings"]["max_steps"]
    if checkpoint.compacted and max_steps != before:
        raise ValueError(
            f"--max_steps {max_steps} is not the run's {before}, and its model is compacted already (step "
            f"{checkpoint.step}); only --recovery_steps can change now"
        )
    last = total if checkpoint.compacted else schedule_of(config.pruning, max_steps).last_pruning_step
    if checkpoint.step > last:
        raise ValueError(
            f"the run has made {checkpoint.step} steps already, more than the {last} that --max_steps {max_steps} and "
            f"--recovery_steps {config.training.recovery_steps} leave for them; ask for more"
        )
