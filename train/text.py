"""Pieces of the messages that a user reads."""

from collections.abc import Iterable


def listed(names: Iterable[object], word: str) -> str:
    """Lists names, at least one, with a word before the last.

    Example:
        >>> from train.text import listed
        >>> listed([1, 2, 4], "or")
        '1, 2 or 4'
        >>> listed(["bias"], "and")
        'bias'
    """
    *others, last = map(str, names)
    return f"{', '.join(others)} {word} {last}" if others else last


def first_line(error: Exception) -> str:
    """Returns what an error says, without what libraries add in further lines."""
    return str(error).partition("\n")[0]
