"""Pure mathematics of pruning: torch and einops only; no collectives, no files, no DeepSpeed."""

from scale_prune.core.compaction import pad_units, resize_group, select_units, set_members
from scale_prune.core.divergence import token_divergence
from scale_prune.core.frequency import frequency_clusters, zipf_clusters
from scale_prune.core.groups import Kind, Member, Role, UnitGroup, UnitLayout, UnitSpan, remaining_fraction
from scale_prune.core.likelihood import IGNORED, perplexity
from scale_prune.core.low_rank import generator_of, random_factors, saves, svd_factors, whitened_factors
from scale_prune.core.redundancy import Products, explained_variance, has_similar, mean_absolute, nearest, sample_units
from scale_prune.core.repair import UnsolvableError, elimination_scores, gram_root, least_squares, mean_takeover
from scale_prune.core.schedule import Schedule
from scale_prune.core.selection import budget, check_finite, group_fractions, select, standardized, top_mask
from scale_prune.core.shards import FlatSlice, ReadSlice, expand_to_shard, shard_bounds, unit_sum
from scale_prune.core.similarity import ROWS_AT_ONCE, Similarity
