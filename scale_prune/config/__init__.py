"""Every setting, and the ways it is given: flags, recipes, DeepSpeed's own file."""

from scale_prune.config.command_line import (
    Mistakes,
    dry_run_ranks,
    parse,
    parse_some,
    plugins_of,
    said_once,
    user_errors,
)
from scale_prune.config.ds_config import DEFAULT, as_it_runs, load, precision, resolve
from scale_prune.config.ds_limits import get, refuse_harmful
from scale_prune.config.places import cache_folder
from scale_prune.config.plugins import load_plugins
from scale_prune.config.recipes import as_settings, check_value, read_recipe, read_yaml, specs, with_keys
from scale_prune.config.setting import FOLLOWS, IGNORED, MUST_AGREE
from scale_prune.config.settings import AS_LINES, CLASSIFICATION, EMBEDDING, TASKS, Config, settings_where

from scale_prune.config.settings import DataConfig, PruningConfig, TaskConfig, TrainingConfig  # isort: skip
