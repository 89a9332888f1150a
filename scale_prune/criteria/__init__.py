"""The criteria, one module each, and what a criterion is."""

from scale_prune.criteria.base import Criterion, GatedCriterion, Moment, Need, ShardView, State, learns_from_gradients
from scale_prune.criteria.ddp import KL_WEIGHT
from scale_prune.criteria.flop import Flop
from scale_prune.criteria.registry import (
    AUTO,
    CRITERIA,
    IN_A_LOOP,
    READERS,
    check_scope,
    check_uniqueness,
    freezes,
    observes,
    register_criterion,
    repairs_masks,
    schedule_of,
    unused,
    with_defaults,
)
