"""Whether what is to remain can be reached: the fewest units that layers keep, by all rules, against the target."""

import math
from collections.abc import Sequence

from scale_prune.config import PruningConfig
from scale_prune.core import UnitGroup, remaining_fraction
from scale_prune.core.level_table import levels_of
from scale_prune.core.selection import MOST_LOST
from scale_prune.criteria import CRITERIA


def check_reachable(groups: Sequence[UnitGroup], config: PruningConfig) -> None:
    """Refuse a target that is less than what the settings leave, or more than what they begin with.

    Raises:
        ValueError: it is, of all units or of those that leave apart.
    """
    if config.latency_target is not None:  # a fraction of time
        return
    _check_budget(groups, config)
    kinds = dict.fromkeys(group.kind for group in groups)
    apart = CRITERIA[config.criterion].apart
    for part in [[group for group in groups if group.kind == kind] for kind in kinds] if apart else [groups]:
        multiples = [1 if group.kind == "head" else config.width_multiple for group in part]
        floors = [-(-_floor(config) // multiple) * multiple for multiple in multiples]
        _refuse_above_target(part, floors, config)
    initial = remaining_fraction(groups, [group.num_units for group in groups])
    if config.initial_rank and initial < config.remaining and "initial_rank" in CRITERIA[config.criterion].settings:
        raise ValueError(
            f"--initial_rank {config.initial_rank} begins with {initial:.4g} of the targets' parameters, fewer than "
            f"the {config.remaining:g} that are to remain; give a higher one, or less --remaining"
        )


def check_min_kept(groups: Sequence[UnitGroup], config: PruningConfig) -> None:
    """Refuse a floor that the target cannot hold.

    Raises:
        ValueError: the groups' floors of `min_kept` units add up to more than the target keeps.
    """
    if config.scope != "per_group" or groups[0].kind == "component":
        _refuse_above_target(groups, [_floor(config)] * len(groups), config)


def _floor(config: PruningConfig) -> int:
    return 1 if config.scope == "per_group" else config.min_kept


def _check_budget(groups: Sequence[UnitGroup], config: PruningConfig) -> None:
    """Refuse a target below the lowest level of a budget."""
    least = {"log": 1 - MOST_LOST, "redundancy": 1 - MOST_LOST}.get(config.budget, 0.0)
    if config.budget in ("measured", "search"):
        least = remaining_fraction(groups, [levels_of(group.num_units)[0] for group in groups])
    if config.remaining < least - 1e-9:
        raise ValueError(
            f"--budget {config.budget} leaves {least:.6g} of the targets at least, more than the "
            f"{config.remaining:.6g} that are to remain; give more, or --budget uniform"
        )


def _refuse_above_target(groups: Sequence[UnitGroup], floors: Sequence[int], config: PruningConfig) -> None:
    """Refuse floors of the groups' units, or all that they have, that are more than is to remain."""
    kept = [min(floor, group.num_units) for floor, group in zip(floors, groups, strict=True)]
    least, total = remaining_fraction(groups, kept), sum(group.num_units for group in groups)
    if config.remaining >= least - 1e-9:
        return
    kinds = {group.kind for group in groups}
    if kinds == {"component"}:
        raise ValueError(
            f"--remaining {config.remaining} cannot be reached: {max(floors)} of the components of each of the "
            f"{len(groups)} weights, the fewest by --min_kept and --scope, are {least:.6f} of their parameters "
            "together; give more"
        )
    enough = math.ceil(least * 1e4) / 1e4
    if CRITERIA[config.criterion].apart:
        (kind,) = kinds
        raise ValueError(
            f"--criterion {config.criterion} brings {kind}s to --remaining {config.remaining:g} by themselves, but "
            f"every layer keeps {max(kept)}, which is {sum(kept)} of {total} {kind}s; give at least --remaining "
            f"{enough:g}" + (", or --targets mlp" if kind == "head" else ", or less --min_kept")
        )
    if (
        kinds == {"neuron"}
        and config.scope != "per_group"
        and max(floors) == config.min_kept > 1 == config.width_multiple
    ):
        allowed = int(config.remaining * total)
        raise ValueError(
            f"--min_kept {config.min_kept} keeps {sum(kept)} units in {len(groups)} layers, more than the {allowed} of "
            f"{total} that --remaining {config.remaining} leaves; "
            + (f"at most --min_kept {allowed // len(groups)} is possible" if allowed >= len(groups) else "give more")
        )
    raise ValueError(
        f"--remaining {config.remaining:g} cannot be reached: the fewest units that layers keep, by --min_kept, "
        f"--width_multiple and with one head at least, are {least:.6g} of the targets' parameters; give at least "
        f"--remaining {enough:g}, or less of these" + (", or --targets mlp" if "head" in kinds else "")
    )
