"""The criteria, registered by being there: one module of this package each, named like its criterion."""

from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules

from scale_prune.config import PruningConfig
from scale_prune.core.schedule import Schedule
from scale_prune.criteria.base import Criterion, GatedCriterion, Moment, Need, ShardView, State

__all__ = [
    "CRITERIA",
    "Criterion",
    "GatedCriterion",
    "Moment",
    "Need",
    "ShardView",
    "State",
    "schedule_of",
    "with_defaults",
]


def _discover() -> dict[str, type[Criterion]]:
    """Import every module but `base`; movement.py holds `class Movement`."""
    found = {}
    for module_info in iter_modules(__path__):
        if module_info.name == "base":
            continue
        module = import_module(f"{__name__}.{module_info.name}")
        found[module_info.name] = getattr(module, module_info.name.title().replace("_", ""))
    return found


CRITERIA: dict[str, type[Criterion]] = _discover()


def with_defaults(config: PruningConfig) -> PruningConfig:
    """Fill the settings that were not given with the criterion's own.

    Raises:
        ValueError: there is no criterion of that name.
    """
    if config.criterion not in CRITERIA:
        raise ValueError(f"--criterion {config.criterion} is unknown; known are {', '.join(CRITERIA)}")
    defaults = CRITERIA[config.criterion].defaults
    return replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})


def schedule_of(config: PruningConfig, total_steps: int, *, initial: float = 1.0) -> Schedule:
    """Return the schedule of a run.

    Args:
        config: settings of pruning, of a known criterion.
        total_steps: optimizer steps with pruning, at least 1.
        initial: remaining fraction at the start.
    """
    return Schedule(
        total_steps=total_steps,
        target=config.remaining,
        warmup_fraction=config.warmup_fraction,
        cooldown_fraction=config.cooldown_fraction,
        update_every=config.update_every,
        initial=initial,
        settles=CRITERIA[config.criterion].settles,
    )
