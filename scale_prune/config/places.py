"""Where lies what is no code: inside an installed package, or beside the package in a checkout."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / "ds_configs"
BUILTIN = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "ds_configs"
"""The folder of the ds_configs that have names."""


def cache_folder() -> Path:
    """Return where the small model of the default run is kept: $SCALE_PRUNE_CACHE, the checkout's, or the user's."""
    if given := os.environ.get("SCALE_PRUNE_CACHE"):
        return Path(given).expanduser()
    root = PACKAGE.parent
    return root / ".cache" if (root / "pyproject.toml").is_file() else Path.home() / ".cache" / "scale_prune"
