"""What there is in a model to prune: families, factorized weights, gates."""

from scale_prune.models.embedding import cluster_groups, cluster_sizes, put_clusters, tied_output
from scale_prune.models.factorized import FACTOR_WORDS, component_groups, full_shape, put_factors
from scale_prune.models.families import (
    FAMILIES,
    Family,
    auto_model,
    classifies,
    family_of,
    model_type_of,
    positions_of,
    register_family,
    stock_class,
)
from scale_prune.models.gates import Gates
from scale_prune.models.layer_units import head_size, linear_inputs, linear_names, stored_groups, unit_groups
from scale_prune.models.recompute import recompute_in_training, recomputing
