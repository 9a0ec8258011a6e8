"""Requests to end a run, as signals: SIGTERM, which precedes a preemption, and SIGINT, Ctrl-C."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Notes the signals while a run is under way; a second Ctrl-C ends the process at once.

    Signals are noticed while JAX compiles or computes, too: Python's own handlers wait until that
    is over. Processes that are joined by `jax.distributed` end together, in the same place.

    Args:
        say: takes the line that tells the user what happens.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._first: int | None = None
        self._together = jax.distributed.is_initialized()
        self._asked = 0
        self._is_reached = False

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal."""
        return 128 + (self._first or signal.SIGTERM)

    def reached(self) -> bool:
        """Whether the run shall end here: all processes must ask in the same places."""
        if self._is_reached or not self._together:
            return self._is_reached or self._first is not None
        self._asked += 1
        self._is_reached = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._is_reached

    def __enter__(self) -> "Interruption":
        # A byte for each signal goes through the pipe, whatever the main thread is doing.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # For SIGTERM, jax.distributed has a handler that tells the other processes.
        caught = SIGNALS[1:] if self._together else SIGNALS
        self._handlers = {number: signal.signal(number, _ignore) for number in caught}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)  # This ends the thread.

    def _watch(self) -> None:
        interrupts = 0
        while received := os.read(self._reader, 1):
            (number,) = received
            if number not in self._handlers:
                continue
            interrupts += number == signal.SIGINT
            if interrupts > 1:
                os._exit(128 + signal.SIGINT)
            if self._first is None:
                self._first = number
                self._say(
                    f"{signal.Signals(number).name}: the run ends after this step, with a "
                    "checkpoint. (Ctrl-C, a second one, ends it at once.)"
                )
                if self._together:
                    os.kill(os.getpid(), signal.SIGTERM)
        os.close(self._reader)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Takes the place of the handler that would end the process; the thread does the rest."""
