"""Checkpoints: folders that are whole or invisible, which one a run goes on from, and what they hold."""

from scale_prune.checkpoint.choice import UNSAID, choose, filled_from, glance
from scale_prune.checkpoint.folder import NEWEST, Checkpoint, newest_first, set_newer_aside
from scale_prune.checkpoint.loop_state import STATE, load_state, save_state
from scale_prune.checkpoint.run_state import (
    check_model_and_text,
    read_kept,
    restore_engine,
    restore_pruner,
    restore_randomness,
    save_run,
)
