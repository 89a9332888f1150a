"""Where the time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Seconds(defaultdict[str, float]):
    """Wall-clock seconds by part of the work."""

    def __init__(self) -> None:
        super().__init__(float)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time that the `with` block takes to a part."""
        started = time.perf_counter()
        yield
        self[part] += time.perf_counter() - started
