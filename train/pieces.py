"""The batches of a run on their way to the devices."""

import collections
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from train.body import Batch
from train.build import accumulation_of, image_shape_of
from train.data.pipeline import train_batches
from train.errors import ending_the_run
from train.setup import Prepared
from train.step import shard


def pieces_of(prepared: Prepared, done: int) -> Iterator[Batch]:
    """Returns this process's shares of the pieces from the first step to do to the last one.

    Args:
        prepared: the run.
        done: steps that are done.
    """
    config = prepared.config
    per_step = accumulation_of(config, jax.device_count()).pieces
    batches = train_batches(
        prepared.dataset,
        prepared.train_examples,
        batch_size=config.transfer_size or config.batch_size,
        image_size=image_shape_of(config, prepared.dataset)[0],
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        first_batch=done * per_step,
        max_bad_examples=config.max_bad_examples,
    )
    return itertools.islice(batches, (prepared.num_steps - done) * per_step)


class PiecesOnDevices:
    """Sends the pieces of the batches to the devices, one ahead of the computation.

    Args:
        batches: the pieces, as `pieces_of` returns them.
        devices: those of all processes.
    """

    def __init__(self, batches: Iterator[Batch], devices: Sequence[jax.Device]) -> None:
        self._batches = batches
        self._devices = devices
        # One thread, for an iterator serves only one at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pieces")
        self._ahead: collections.deque[Future[tuple[Batch, int] | None]] = collections.deque()
        self._seconds = 0.0
        self._bad_examples = 0
        self.prefetch()

    def take(self) -> Batch:
        """Returns the next piece, laid out as `shard` does.

        Raises:
            RunError: an example of it cannot be read.
        """
        started = time.perf_counter()
        with ending_the_run():
            piece = self._ahead.popleft().result()
        self._seconds += time.perf_counter() - started
        assert piece is not None
        batch, bad_examples = piece
        self._bad_examples += bad_examples
        return batch

    def prefetch(self) -> None:
        """Starts the piece after it on its way, while the devices compute."""
        self._ahead.append(self._thread.submit(self._fetch))

    def _fetch(self) -> tuple[Batch, int] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        bad_examples = int(batch.pop("bad_examples"))
        return jax.block_until_ready(shard(batch, self._devices)), bad_examples

    def waited(self) -> float:
        """Returns the seconds since the last call in which the devices had to wait for a piece."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def bad_examples(self) -> int:
        """Returns how many examples since the last call others have taken the place of."""
        number, self._bad_examples = self._bad_examples, 0
        return number
