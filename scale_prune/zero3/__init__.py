"""Everything that touches DeepSpeed: processes, engines, shards in and out, and the rebuild after compaction."""

from scale_prune.zero3.backend import Zero3Backend, check_maskable, gradients_finite, num_parameters
from scale_prune.zero3.engine_state import write_working_copy
from scale_prune.zero3.frozen import FrozenEngine
from scale_prune.zero3.loading import load_model
from scale_prune.zero3.prepare import prepare_units
from scale_prune.zero3.randomness import random_state, set_random_state
from scale_prune.zero3.ranks import check_launcher, give_back, joined, launched_as, own_device
from scale_prune.zero3.rebuild import compact_engine, reading, release
from scale_prune.zero3.repair import repair_weights, tried
from scale_prune.zero3.runtime import Runtime, inference_engine, training_engine, working_dtype
from scale_prune.zero3.saving import of_all_ranks, told_to_all, write_model
from scale_prune.zero3.teacher import Teacher
