"""Commands as their users see them: the exit code, and what is said on stderr. Imports none of them."""

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO

Command = Callable[[Sequence[str]], None]


def outcome_of(command: Command, *argv: object) -> tuple[int, str]:
    """Return the exit code of a command in this process, and what it wrote to stderr."""
    with redirect_stderr(StringIO()) as errors:
        try:
            command(list(map(str, argv)))
        except SystemExit as exit:
            return int(exit.code or 0), errors.getvalue()
    return 0, errors.getvalue()


def errors_of(stderr: str) -> list[str]:
    """Return the messages."""
    return [line for line in stderr.splitlines() if line.startswith("error:")]
