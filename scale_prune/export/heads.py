"""How a config tells the heads of a layer, and whether it can."""

from collections.abc import Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from scale_prune.core import UnitGroup, resize_group
from scale_prune.export.plain_configs import without_layout
from scale_prune.models import head_size, stock_class, unit_groups


def tells_heads(config: PretrainedConfig) -> bool:
    """Tell whether a config decides about the number of heads by itself, and not about their size as well."""
    config, stock = without_layout(config), stock_class(config)
    try:
        with torch.device("meta"):
            dense = unit_groups(stock(config), ("attention",))
            fewer = tuple(resize_group(group, 1) for group in dense)
            set_heads(config, fewer[0])
            return unit_groups(stock(config), ("attention",)) == fewer
    except Exception:  # whatever an architecture raises at a number that it cannot have
        return False


def fitting_heads(config: PretrainedConfig, heads: Sequence[UnitGroup]) -> int:
    """Return the fewest units of heads that a config can tell all layers to have, and that are enough for each.

    Those of a Llama refuse numbers that do not divide the width of the model. One that cannot tell any keeps all.
    """
    config, widest = without_layout(config), max(heads, key=lambda group: group.num_units)
    dense = config.num_attention_heads * head_size(config) // widest.block
    if not tells_heads(config):
        return dense
    return next(count for count in range(widest.num_units, dense + 1) if _takes(config, resize_group(widest, count)))


def _takes(config: PretrainedConfig, group: UnitGroup) -> bool:
    config = without_layout(config)
    set_heads(config, group)
    try:
        config.validate()
    except StrictDataclassError:
        return False
    return True


def plainest(config: PretrainedConfig, groups: Sequence[UnitGroup]) -> str:
    """Return "uniform" where it can hold what is left of the layers, else "per_layer"."""
    alike = all(len({group.num_units for group in groups if group.kind == kind}) < 2 for kind in ("neuron", "head"))
    heads = [group for group in groups if group.kind == "head"]
    return "uniform" if alike and (not heads or fitting_heads(config, heads) == heads[0].num_units) else "per_layer"


def set_heads(config: PretrainedConfig, group: UnitGroup) -> None:
    """Let a config tell the heads of one group, and their size."""
    config.head_dim = head_size(config)
    for name, count in head_words(config, group).items():
        setattr(config, name, count)


def head_words(config: PretrainedConfig, group: UnitGroup) -> dict[str, int]:
    """Return what a config calls the heads of a layer, and how many there are."""
    words = {"num_attention_heads": group.num_features // head_size(config)}
    if getattr(config, "num_key_value_heads", None) is not None:
        words["num_key_value_heads"] = group.num_units
    return words
