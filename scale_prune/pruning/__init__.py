"""Units, scores and masks over a backend that shards the parameters. No DeepSpeed."""

from scale_prune.pruning.activations import ActivationSampler
from scale_prune.pruning.calibration import ROWS_AT_ONCE, Calibration, keeper_of, layer_of
from scale_prune.pruning.choosing import choose, take_calibration
from scale_prune.pruning.dense_units import DenseUnits
from scale_prune.pruning.pruner import Pruner
from scale_prune.pruning.reach import check_min_kept, check_reachable
from scale_prune.pruning.solving import roots_of, takeovers_of
from scale_prune.pruning.state import carry_over, facts_of, pruner_slices, restore
from scale_prune.pruning.units import (
    clusters_of,
    components_of,
    embedding_tied_as_asked,
    neurons_and_heads,
    removes_components,
    removes_heads,
    sketch_units,
    units_of,
)
