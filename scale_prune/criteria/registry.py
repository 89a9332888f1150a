"""The criteria by name: one module of this package each, registered by being there, and those of plugins."""

import re
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, get_args

from scale_prune.config import EMBEDDING, PruningConfig
from scale_prune.core import Role, Schedule
from scale_prune.criteria.base import Criterion, GatedCriterion, Need, learns_from_gradients

NO_CRITERIA = ("base", "registry")
CRITERIA: dict[str, type[Criterion]] = {}
AUTO, BY_THE_COMMAND, IN_A_LOOP = "auto", "kfac", "gum"
READERS = ("redundancy", "measured", "search")
"""Budgets that read the calibration text."""


def register_criterion(name: str, criterion: type[Criterion]) -> None:
    """Make a criterion known as `--criterion name`; the same class may come again, as where a notebook is run twice.

    Args:
        name: a small letter, then small letters, digits and _.
        criterion: a subclass of `Criterion`.

    Raises:
        ValueError: the name is not valid or is another criterion's, or the class contradicts itself.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"criterion {name!r}: a name is a small letter, then small letters, digits and _")
    if not (isinstance(criterion, type) and issubclass(criterion, Criterion)):
        raise ValueError(f"criterion {name}: {criterion!r} is no subclass of scale_prune.Criterion")
    known = CRITERIA.get(name, criterion)
    if (known.__module__, known.__qualname__) != (criterion.__module__, criterion.__qualname__):
        raise ValueError(f"criterion {name} is {known.__module__}.{known.__qualname__} already, give another name")
    if problem := _problem_of(criterion):
        raise ValueError(f"criterion {name}: {problem}")
    CRITERIA[name] = criterion


def _problem_of(criterion: type[Criterion]) -> str | None:
    """Tell what a class says that cannot be."""
    settings = [spec.name for spec in fields(PruningConfig)]
    words: dict[str, tuple[Collection[str], Sequence[str]]] = {
        "needs": (criterion.needs, get_args(Need)),
        "kind": ([criterion.kind], ("neuron", "component")),
        "roles": (criterion.roles, get_args(Role)),
        "settings": (criterion.settings, settings),
        "defaults": (criterion.defaults, settings),
    }
    for attribute, (found, valid) in words.items():
        if unknown := sorted(map(str, set(found) - set(valid))):
            return f"{attribute} has {unknown[0]!r}, valid are {', '.join(valid)}"
    if criterion.defaults.get("scope") not in ("global", "per_group"):
        return 'defaults must have a "scope", global or per_group'
    if ("gate" in criterion.needs) != issubclass(criterion, GatedCriterion):
        return 'needs has "gate" where the class is a GatedCriterion, and nowhere else'
    if "output_grad" in criterion.needs and "gram" not in criterion.needs:
        return 'needs has "output_grad", which is for rank_units, but not "gram"'
    if criterion.kind == "component" and criterion.needs & {"influence", "activation", "activity", "gram"}:
        return "components have no activations of their own, only neurons have"
    methods = {
        "weight": ("share",),
        "grad": ("share", "update"),
        "influence": ("of_sequences", "update"),
        "activity": ("activity",),
        "gram": ("rank_units",),
        "gate": ("update",),
    }
    for need, names in methods.items():
        for method in names if need in criterion.needs else ():
            if getattr(criterion, method) is getattr(Criterion, method):
                return f"needs has {need!r}, but the class has no method {method}"
    return None


def criterion_in(module: ModuleType) -> type[Criterion] | None:
    """Return the criterion that a module defines, if any: the one that is named like it, else the last one."""
    own = {
        name.lower(): each
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, Criterion) and each.__module__ == module.__name__
    }
    stem = module.__name__.rpartition(".")[2]
    return own.get(stem.replace("_", ""), next(reversed(own.values()), None))


def _discover() -> None:
    for module_info in iter_modules([str(Path(__file__).parent)]):
        if module_info.name in NO_CRITERIA:
            continue
        criterion = criterion_in(import_module(f"scale_prune.criteria.{module_info.name}"))
        if criterion is not None:
            register_criterion(module_info.name, criterion)


_discover()


def with_defaults(config: PruningConfig, usual: str = BY_THE_COMMAND) -> PruningConfig:
    """Fill the settings that were not given with the criterion's own, but for rounds that follow from the steps.

    Args:
        config: the settings.
        usual: the criterion that "auto" stands for.

    Raises:
        ValueError: there is no criterion of that name.
    """
    if config.criterion == AUTO:
        config = replace(config, criterion=usual)
    if config.criterion not in CRITERIA:
        raise ValueError(f"--criterion {config.criterion} is unknown; known are {', '.join(CRITERIA)}")
    criterion = CRITERIA[config.criterion]
    defaults = ({} if "gram" in criterion.needs else {"rounds": 0}) | criterion.defaults
    if config.budget != "uniform" and criterion.kind == "neuron":
        defaults |= {"scope": "per_group"}  # the only one that a budget can be of
    return replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})


def unused(config: PruningConfig) -> dict[str, Any]:
    """Return what was set, by name, and changes nothing under the criterion; 0 asks for nothing."""
    filled = with_defaults(config)
    if config.remaining == 1:
        return {}
    used = CRITERIA[filled.criterion].settings
    if filled.scope == "per_group":
        used -= {"min_kept"}
    needs = CRITERIA[filled.criterion].needs
    if filled.rounds or "gram" in needs:
        used -= {"update_every"}
        used -= {"similarity_every", "similarity_tokens"} if "activation" not in needs else set()
    if EMBEDDING not in config.target_names:
        used -= {"embedding_clusters", "tie_embeddings"}
    others = frozenset[str]().union(*(each.settings for each in CRITERIA.values())) - used
    values = {spec.name: (getattr(config, spec.name), spec.default) for spec in fields(config) if spec.name in others}
    return {name: value for name, (value, default) in values.items() if value not in (default, 0)}


def freezes(config: PruningConfig) -> bool:
    """Tell whether weights stay as they are until what is to leave has left."""
    return CRITERIA[config.criterion].freezes and config.remaining < 1


def repairs_masks(config: PruningConfig) -> bool:
    """Tell whether masks are repaired at their end, if the calibration text has less loss so."""
    return config.repair not in (None, "none") and not config.rounds and not freezes(config)


def observes(config: PruningConfig, *, trains: bool) -> bool:
    """Tell whether a criterion takes gradients of the calibration text, which no step follows.

    Args:
        config: the settings, of a known criterion.
        trains: weights are trained before the units leave.
    """
    return learns_from_gradients(CRITERIA[config.criterion]) and config.remaining < 1 and not trains


def check_uniqueness(config: PruningConfig) -> None:
    """Refuse a penalty of similar neurons where no similarity is kept.

    Raises:
        ValueError: `uniqueness` is above 0, and the criterion does not use it.
    """
    if "uniqueness" in unused(config):
        criterion = with_defaults(config).criterion
        raise ValueError(
            f"--uniqueness {config.uniqueness} does nothing under --criterion {criterion}, which keeps no "
            "similarity of neurons; give --uniqueness 0, or --criterion gum, which is movement with uniqueness, over "
            "the whole model or with --scope per_group"
        )


def check_scope(config: PruningConfig) -> None:
    """Refuse a budget of layers where scores say what each layer loses, and scores that cannot say it.

    Raises:
        ValueError: the scope is not `per_group`, or the criterion removes components; or the scores of heads and
            neurons would be ranked together, and cannot be compared.
    """
    components = CRITERIA[config.criterion].kind == "component"
    if config.budget != "uniform" and (config.scope != "per_group" or components):
        raise ValueError(
            f"--budget {config.budget} says what each layer loses, --scope {config.scope} lets scores say it; give "
            "--scope per_group, and a criterion of neurons"
        )
    together = {"mlp", "attention"} <= set(config.target_names) and config.scope == "global"
    if CRITERIA[config.criterion].grows is None and together:
        raise ValueError(
            f"--scope global ranks heads and neurons together, whose scores under --criterion {config.criterion} are "
            "numbers of different kinds; give --scope per_group or another criterion"
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
        rounds=config.rounds or 0,
    )
