"""A scheduler's warning before it kills: SIGTERM."""

import signal
from types import FrameType

STOPPED = 75
"""Exit code of a run that was told to stop, and has saved what it needs to go on."""


class StopSignal:
    """Remembers a SIGTERM, so that the step can be finished and saved; a second one ends the process as usual.

    Attributes:
        received: True once the signal came.
    """

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
