"""What ends a run with one line, without a traceback."""

import contextlib
import errno
from collections.abc import Iterator


class RunError(Exception):
    """The run cannot go on, or has been told to end.

    Attributes:
        exit_code: what the process returns.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def ending_the_run() -> Iterator[None]:
    """Makes data that cannot be read the end of the run.

    Raises:
        RunError: in the place of a ValueError or an OSError, whose message is one line.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunError(str(error)) from error


def remedy_of(code: int | None) -> str:
    """Says what helps against an error of the operating system that has this code."""
    return "free some space" if code in (errno.ENOSPC, errno.EDQUOT) else "put that right"
