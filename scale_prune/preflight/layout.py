"""The layout that a run will write, settled and checked before it costs anything."""

from transformers import PreTrainedModel

from scale_prune.config import PruningConfig
from scale_prune.core import budget, resize_group
from scale_prune.criteria import CRITERIA
from scale_prune.export import GGUF, check_gguf, check_layout, fitting_heads, plainest, tells_heads
from scale_prune.models import stored_groups
from scale_prune.preflight.reading import Reading
from scale_prune.pruning import removes_heads


def check_layout_of(reading: Reading) -> None:
    """Refuse a layout that cannot hold models of this kind, or what the criterion leaves of them.

    Raises:
        ValueError: it cannot.
    """
    if reading.model_config is None or not reading.needs_groups:
        return
    heads = removes_heads(reading.config.pruning)
    if heads and reading.chooses_layout and not tells_heads(reading.model_config):
        reading.take_per_layer()
    layout, values = str(reading.config.output.layout), reading.model_config.to_dict()
    check_layout(layout, reading.model_config, heads=heads)
    components = CRITERIA[reading.config.pruning.criterion].kind == "component"
    if components and (values.get("per_layer_config") or values.get("block_configs")):
        model = reading.config.training.model
        raise ValueError(
            f"--model {model} has layers of different widths, beside which factors have no place; "
            f"make them one width: python launch/convert.py {model} --to pad --output FOLDER"
        )
    if layout == GGUF and heads and not (_alike(reading.config.pruning) and tells_heads(reading.model_config)):
        raise ValueError(
            "--layout gguf has no place for different numbers of heads; give --layout pad, or --scope per_group and "
            "--budget uniform, by which all layers of a Llama keep as many"
        )
    if layout == GGUF and reading.tokenizer is not None:
        check_gguf(reading.model_config, reading.tokenizer, heads=heads)


def settle_layout(reading: Reading, model: PreTrainedModel) -> None:
    """Take a layout that holds the layers as they are already, or refuse one that does not.

    Raises:
        ValueError: the user has asked for it.
    """
    layout, asked = str(reading.config.output.layout), reading.model_config
    if CRITERIA[reading.config.pruning.criterion].kind == "component" or layout not in ("uniform", GGUF):
        return
    assert asked is not None
    groups = stored_groups(model)
    if plainest(asked, groups) == "uniform":
        return
    if layout == "uniform" and reading.chooses_layout:
        reading.take_per_layer()
    elif layout == "uniform" or any(group.kind == "head" for group in groups):
        raise ValueError(
            f"--layout {layout} cannot hold the layers of --model {reading.config.training.model}, which differ "
            "already; choose --layout pad or per_layer"
        )


def settle_heads(reading: Reading) -> None:
    """Take a layout that holds as many heads as every layer will keep, or refuse one whose config cannot tell them.

    Raises:
        ValueError: the user has asked for it; or there is nothing but one head in every layer.
    """
    layout, pruning, model_config = str(reading.config.output.layout), reading.config.pruning, reading.model_config
    heads = [group for group in reading.groups if group.kind == "head"]
    if heads == [*reading.groups] and max(group.num_units for group in heads) == 1 and pruning.remaining < 1:
        raise ValueError(
            f"--targets {pruning.targets}: every layer of --model {reading.config.training.model} has one head of keys "
            "and values, which cannot leave; give --targets mlp"
        )
    if not heads or layout not in ("uniform", GGUF) or not _alike(pruning):
        return
    assert model_config is not None
    nearest = len(heads) < len(reading.groups)  # the layer's neurons make up for the rounding
    left = [resize_group(group, budget(pruning.remaining, group.num_units, nearest=nearest)) for group in heads]
    if (fitting := fitting_heads(model_config, left)) == left[0].num_units:
        return
    if layout == "uniform" and reading.chooses_layout:
        reading.take_per_layer()
        return
    raise ValueError(
        f"--layout {layout} cannot hold the {left[0].num_units} of {heads[0].num_units} units of heads that "
        f"--remaining {pruning.remaining:g} leaves in a layer: the config of a {model_config.model_type} refuses this "
        f"number, the next that it takes is {fitting}; choose --layout pad or per_layer, or another --remaining"
    )


def _alike(pruning: PruningConfig) -> bool:
    """Tell whether all layers keep as many units."""
    return pruning.scope == "per_group" and pruning.budget == "uniform"
