"""Keep the tests off the network, off GPUs and out of the user's caches; before anything is imported that reads it."""

import atexit
import os
import shutil
import tempfile

CACHE = tempfile.mkdtemp(prefix="cache-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = f"{CACHE}/modules"
os.environ["HF_DATASETS_CACHE"] = f"{CACHE}/datasets"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import wanda  # noqa: E402, F401  # a plugin: every law of the criteria holds for it as well
