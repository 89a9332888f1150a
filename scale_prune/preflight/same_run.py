"""What may change when a run goes on, and what may not."""

from scale_prune.checkpoint import UNSAID, Checkpoint
from scale_prune.config import Config, get, precision, settings_where
from scale_prune.criteria import schedule_of
from scale_prune.data import Inputs

FIXED_IN_DS_CONFIG = ("train_batch_size", "optimizer.type", "scheduler.type", "bf16.enabled", "fp16.enabled")


def check_same(checkpoint: Checkpoint, inputs: Inputs) -> list[str]:
    """Refuse settings under which the run would not be the same one.

    Returns:
        A line for every other setting that has changed.

    Raises:
        ValueError: a setting that must not change has changed, or the run is past the steps that are asked for.
    """
    before, now = UNSAID | checkpoint.state["settings"], inputs.config.flat()
    changed = [name for name in now if name in before and now[name] != before[name]]
    if precision(checkpoint.state["ds_config"]) == precision(inputs.ds_config):  # whatever says so
        changed = [name for name in changed if name != "precision"]
    for name in changed:
        if name not in settings_where("may_change", True):
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
