"""Which versions made a result."""

import platform
from importlib.metadata import version

from scale_prune import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "rouge-score", "sacrebleu", "scikit-learn")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    own = {"python": platform.python_version(), "scale_prune": __version__}  # known also where it was not installed
    return own | {name: version(name) for name in PACKAGES}
