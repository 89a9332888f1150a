"""Keep the tests off the network, off GPUs and out of the user's caches; before anything is imported that reads it.

Tests without ranks come first: they tell soonest, and meanwhile the server of ranks starts.
"""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest

CACHE = tempfile.mkdtemp(prefix="cache-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = f"{CACHE}/modules"
os.environ["HF_DATASETS_CACHE"] = f"{CACHE}/datasets"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import wanda  # noqa: E402, F401  # a plugin: every law of the criteria holds for it as well
from distributed import start_server  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--claims", type=Path, help="folder in which runs side by side claim the test files that they run")


def has_ranks(item: pytest.Item) -> bool:
    return item.get_closest_marker("distributed") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, so that runs side by side end together."""
    size = cache(lambda path: path.stat().st_size)
    items.sort(key=lambda item: (has_ranks(item), -size(item.path)))


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(map(has_ranks, session.items)) and not session.config.option.collectonly:
        start_server()


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Leave out the files that another run has claimed."""
    claims = item.config.getoption("--claims")
    return None if claims is None or is_claimed(claims / item.path.name) else True


@cache
def is_claimed(claim: Path) -> bool:
    """Claim a file for this run, and tell whether it was the first to do so."""
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
