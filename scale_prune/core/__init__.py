"""Pure mathematics of pruning: torch only; no collectives, no files, no DeepSpeed."""
