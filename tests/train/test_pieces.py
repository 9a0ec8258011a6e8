import threading

import jax
import numpy as np
import pytest

from train import pieces as module
from train.errors import RunError


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until somebody moves its hands, and a gate that a look opens."""

    class Clock:
        now = 100.0
        gate = threading.Event()

        def perf_counter(self):
            self.gate.set()
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def pieces(clock, seconds, wait_for_gate):
    def read():
        while True:
            if wait_for_gate:
                assert clock.gate.wait(timeout=60)
            clock.now += seconds
            yield {"label": np.arange(4), "bad_examples": 1}

    return module.PiecesOnDevices(read(), jax.devices()[:1])


def test_devices_wait_for_a_reader_that_is_late(clock):
    late = pieces(clock, 5.0, wait_for_gate=True)

    batch = late.take()

    assert batch["label"].shape == (1, 4)
    assert late.waited() == 5.0
    assert late.waited() == 0.0


def test_devices_do_not_wait_for_what_was_read_while_they_computed(clock):
    ready = pieces(clock, 5.0, wait_for_gate=False)
    ready._ahead[0].result()

    ready.take()

    assert ready.waited() == 0.0


def test_failure_to_read_is_raised_where_the_piece_is_needed():
    def read():
        yield {"label": np.arange(2), "bad_examples": 0}
        raise ValueError("n01_7.JPEG cannot be decoded")

    failing = module.PiecesOnDevices(read(), jax.devices()[:1])
    failing.take()
    failing.prefetch()

    with pytest.raises(RunError, match="n01_7"):
        failing.take()
