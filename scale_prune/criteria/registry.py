"""The criteria, registered by being there: one module of this package each, named like its criterion."""

from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from scale_prune.config import EMBEDDING, PruningConfig
from scale_prune.core import Schedule
from scale_prune.criteria.base import Criterion

NO_CRITERIA = ("base", "registry")


def _discover() -> dict[str, type[Criterion]]:
    """Import every module but those that hold none; movement.py holds `class Movement`."""
    found = {}
    for module_info in iter_modules([str(Path(__file__).parent)]):
        if module_info.name in NO_CRITERIA:
            continue
        module = import_module(f"scale_prune.criteria.{module_info.name}")
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


def unused(config: PruningConfig) -> dict[str, Any]:
    """Return what was set, by name, and changes nothing under the criterion; 0 asks for nothing."""
    filled = with_defaults(config)
    if config.remaining == 1:
        return {}
    used = CRITERIA[config.criterion].settings
    if filled.scope != "global":
        used -= {"min_kept"}
    if EMBEDDING not in config.target_names:
        used -= {"embedding_clusters", "tie_embeddings"}
    others = frozenset[str]().union(*(each.settings for each in CRITERIA.values())) - used
    values = {spec.name: (getattr(config, spec.name), spec.default) for spec in fields(config) if spec.name in others}
    return {name: value for name, (value, default) in values.items() if value not in (default, 0)}


def check_uniqueness(config: PruningConfig) -> None:
    """Refuse a penalty of similar neurons where no similarity is kept.

    Raises:
        ValueError: `uniqueness` is above 0, and the criterion does not use it.
    """
    if "uniqueness" in unused(config):
        raise ValueError(
            f"--uniqueness {config.uniqueness} does nothing under --criterion {config.criterion}, which keeps no "
            "similarity of neurons; give --uniqueness 0, or --criterion gum, which is movement with uniqueness, over "
            "the whole model or with --scope per_group"
        )


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
