"""How a run ends before its end: by a scheduler's warning, SIGTERM, or because the other ranks are gone."""

import signal
from collections.abc import Iterable
from types import FrameType

STOPPED = 75
"""Exit code of a run that was asked to stop, and has saved what it needs to go on."""

LOST_CONTACT = 76
"""Exit code of a rank that waited in vain for the others; the run can go on from its newest checkpoint."""


class StopSignal:
    """Remembers SIGTERM, so that the step can be finished and saved.

    Later ones change nothing: launchers send several at once. What hangs is ended by the SIGKILL that follows them.

    Args:
        numbers: the signals that it remembers.

    Attributes:
        received: True once the signal came.
    """

    def __init__(self, numbers: Iterable[int] = (signal.SIGTERM,)) -> None:
        self.received = False
        for number in numbers:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
