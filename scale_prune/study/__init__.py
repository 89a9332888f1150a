"""Many runs: a grid of settings, run cell by cell, and finished runs compared. No DeepSpeed."""

from scale_prune.study.comparison import as_json, as_table, check_same, find, read
from scale_prune.study.figures import draw
from scale_prune.study.rows import PERPLEXITY, rows_of
