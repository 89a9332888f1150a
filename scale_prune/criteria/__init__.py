"""The criteria, registered by being there: one module of this package each, named like its criterion."""

from importlib import import_module
from pkgutil import iter_modules

from scale_prune.config import PruningConfig
from scale_prune.criteria.base import Criterion, Moment, Need, ShardView, State

__all__ = ["CRITERIA", "Criterion", "Moment", "Need", "ShardView", "State", "make_criterion"]


def _discover() -> dict[str, type[Criterion]]:
    """Import every module but `base`; its criterion is the class that is defined there, `class Movement` in movement.py."""
    found = {}
    for module_info in iter_modules(__path__):
        if module_info.name == "base":
            continue
        module = import_module(f"{__name__}.{module_info.name}")
        found[module_info.name] = getattr(module, module_info.name.title().replace("_", ""))
    return found


CRITERIA: dict[str, type[Criterion]] = _discover()


def make_criterion(config: PruningConfig, seed: int) -> Criterion:
    """Build the criterion that the settings name.

    Raises:
        ValueError: there is no criterion of that name.
    """
    if config.criterion not in CRITERIA:
        raise ValueError(f"--criterion {config.criterion} is unknown; known are {', '.join(CRITERIA)}")
    return CRITERIA[config.criterion](config, seed)
