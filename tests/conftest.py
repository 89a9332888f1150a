"""Keep the tests off the network and out of the user's caches; before transformers is imported, which reads this."""

import atexit
import os
import shutil
import tempfile

MODULES_CACHE = tempfile.mkdtemp(prefix="modules-")
atexit.register(shutil.rmtree, MODULES_CACHE, ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = MODULES_CACHE
