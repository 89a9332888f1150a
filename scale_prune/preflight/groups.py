"""What is to be pruned, sketched without weights, and whether it can be pruned as far as is asked."""

from dataclasses import replace

from scale_prune.export import check_width_key
from scale_prune.preflight.budgets import afforded, read_table, sizes_of
from scale_prune.preflight.layout import settle_heads, settle_layout
from scale_prune.preflight.named_models import built
from scale_prune.preflight.output import finds_checkpoint
from scale_prune.preflight.reading import Reading
from scale_prune.preflight.rounds import check_repair
from scale_prune.pruning import check_min_kept, check_reachable, removes_components, sketch_units


def check_groups(reading: Reading) -> None:
    """Sketch what is to be pruned, and refuse what cannot be built, or be pruned as far as is asked.

    Raises:
        ValueError: it cannot.
    """
    if reading.model_config is None:
        return
    training = reading.config.training
    model = built(reading.model_config, training.model, training.trust_remote_code)
    dropped = getattr(reading.model_config, "layerdrop", 0)
    if reading.needs_groups and dropped and reading.world_size > 1:
        raise ValueError(
            f"--model {training.model} drops layers by chance (layerdrop {dropped:g}), other ones on "
            'every rank, whose gathers of parameters then do not fit together; set "layerdrop": 0 in its config.json'
        )
    if reading.needs_groups:
        settle_layout(reading, model)
        sizes = sizes_of(model)
        reading.groups = sketch_units(model, reading.config.pruning)
        pruning = afforded(reading.config.pruning, reading.explicit, sizes, reading.groups)
        reading.config = replace(reading.config, pruning=pruning)
        settle_heads(reading)
        if pruning.table is not None and pruning.budget in ("measured", "search"):
            read_table(pruning.table, reading.groups)
        if empty := [group for group in reading.groups if not group.num_units]:
            raise ValueError(f"--model {training.model} has 0 neurons in {empty[0].name}; give another one")
        if not finds_checkpoint(reading.config):  # of a version that did not refuse it
            check_reachable(reading.groups, pruning)
        check_min_kept(reading.groups, pruning)
        if not removes_components(reading.config.pruning):
            check_width_key(model)
            check_repair(model, reading.groups, reading.config.pruning)
