"""All that can be known before ranks meet: checks, what may change on resume, estimates, the dry run."""

from scale_prune.preflight.budgets import read_table
from scale_prune.preflight.dry import dry_run
from scale_prune.preflight.inputs import fill_in, read_inputs, unused_settings
from scale_prune.preflight.output import check_output, goes_on, is_complete, is_empty
from scale_prune.preflight.rounds import calibration_warning
from scale_prune.preflight.same_run import check_same
