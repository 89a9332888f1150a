"""Which versions made a result."""

import platform
from importlib.metadata import version

PACKAGES = ("scale_prune", "torch", "deepspeed", "transformers", "datasets", "rouge-score", "sacrebleu", "scikit-learn")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
