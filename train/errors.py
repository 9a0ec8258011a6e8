"""What ends a run with one line, without a traceback."""


class RunError(Exception):
    """The run cannot go on, or has been told to end.

    Attributes:
        exit_code: what the process returns.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
