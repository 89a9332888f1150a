"""Everything that touches DeepSpeed: processes, engines, shards in and out, and the rebuild after compaction."""

from scale_prune.zero3.backend import Zero3Backend, num_parameters
from scale_prune.zero3.rebuild import compact_engine
from scale_prune.zero3.runtime import Runtime

__all__ = ["Runtime", "Zero3Backend", "compact_engine", "num_parameters"]
