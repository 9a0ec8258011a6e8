"""Batches for training and for evaluation, fed by grain.

A batch is cut into equal parts, one after another, for the processes. What it holds depends on its
place in the run alone, so the parts together are what a single process would get.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import grain
import numpy as np

from train.data.dataset import Dataset, Example

Batch = dict[str, np.ndarray]

# Examples that a thread prepares in one go: enough that handing them out costs nothing even for
# tiny images, few enough that all threads are busy almost to the end of a batch.
CHUNK = 16


def train_batches(
    dataset: Dataset,
    examples: Sequence[Example],
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    first_batch: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Endless shuffled batches of augmented images.

    Every pass sees every example once, in another order. A batch may begin in one pass and end in
    the next, so that no example is dropped however large the batch.

    Args:
        dataset: says how an example becomes an image to train on.
        examples: the training split.
        batch_size: examples per batch, over all processes.
        image_size: height and width of the images.
        seed: the same seed gives the same batches, to the last bit.
        process_index: which part of each batch to return.
        process_count: the processes, which must divide the batch.
        first_batch: index of the batch to begin with, for a run that goes on.

    Returns:
        An iterator over batches of "image", uint8, and "label", int32. Its state, for `get_state`
        and `set_state`, counts the batches, so it is the same on every process.
    """

    def prepare(example: Example, rng: np.random.Generator) -> Batch:
        return {
            "image": dataset.augment(example, image_size, rng),
            "label": np.asarray(example["label"], np.int32),
        }

    # The generator that random_map hands out depends on the seed and on the place in the endless
    # stream, so it comes after repeat, and before anything is cut up for the processes.
    stream = grain.MapDataset.source(examples).seed(seed).shuffle().repeat().random_map(prepare)
    parts = _Parts(
        stream,
        dataset.image_shape(image_size),
        num_batches=len(stream) // batch_size,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    return iter(_read_ahead(parts, first_batch))


def eval_batches(
    dataset: Dataset,
    examples: Sequence[Example],
    *,
    batch_size: int,
    image_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every example once, in order; what is left of the last batch is zeros.

    Args:
        dataset: says how an example becomes an image to test on.
        examples: the split.
        batch_size: examples per batch, over all processes.
        image_size: height and width of the images.
        process_index: which part of each batch to return.
        process_count: the processes, which must divide the batch.

    Returns:
        As many batches on every process, with a "mask", float32, that is 1 for an example and 0
        for what fills up: that may be all that a process has of the last batch.
    """

    def prepare(example: Example) -> Batch:
        return {
            "image": dataset.crop(example, image_size),
            "label": np.asarray(example["label"], np.int32),
        }

    parts = _Parts(
        grain.MapDataset.source(examples).map(prepare),
        dataset.image_shape(image_size),
        num_batches=math.ceil(len(examples) / batch_size),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    for index, batch in enumerate(_read_ahead(parts)):
        is_example = np.asarray(parts.positions(index)) < len(examples)
        yield {**batch, "mask": is_example.astype(np.float32)}


class _Parts:
    """One process's parts of all batches, by the batch's index.

    Grain could batch single examples too. But its threads would hand them over one by one, which is
    slower, with tiny images several times; to stack them would take memory for the batch twice; and
    the state would count examples, other ones on each process.
    """

    def __init__(
        self,
        examples: grain.MapDataset[Batch],
        image_shape: tuple[int, int, int],
        *,
        num_batches: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ) -> None:
        if batch_size % process_count:
            raise ValueError(
                f"the batch size is {batch_size}, but must be a multiple of the number of "
                f"processes, {process_count}: change it, so that all get equal parts."
            )
        self._examples = examples
        self._image_shape = image_shape
        self._num_batches = num_batches
        self._batch_size = batch_size
        self._size = batch_size // process_count
        self._offset = process_index * self._size
        self._num_threads = _num_cores()
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="examples")

    def __len__(self) -> int:
        return self._num_batches

    def positions(self, index: int) -> range:
        """Returns which examples the part of a batch consists of."""
        start = index * self._batch_size + self._offset
        return range(start, start + self._size)

    def __getitem__(self, index: int) -> Batch:
        positions = self.positions(index)
        batch: Batch = {
            "image": np.zeros((self._size, *self._image_shape), np.uint8),
            "label": np.zeros(self._size, np.int32),
        }

        def fill(rows: range) -> None:
            for row in rows:
                if positions[row] < len(self._examples):
                    for name, value in self._examples[positions[row]].items():
                        batch[name][row] = value

        rows = range(self._size)
        running: deque[Future[None]] = deque()
        for start in range(0, self._size, CHUNK):
            # All at once would keep a program that wants to end until the whole batch is made.
            if len(running) == 2 * self._num_threads:
                running.popleft().result()
            running.append(self._threads.submit(fill, rows[start : start + CHUNK]))
        for future in running:
            future.result()
        return batch


def _read_ahead(parts: _Parts, first: int = 0) -> grain.IterDataset[Batch]:
    # A buffer holds whole batches, 2.5 GB each with 16,384 photos of 224x224: two of them hide the
    # time that a batch takes. One batch is made after another, each by all threads of `parts`.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return grain.MapDataset.source(parts)[first:].to_iter_dataset(options)


def _num_cores() -> int:
    # Of a large machine's cores few may be this process's; macOS does not tell. More threads than
    # cores are slower, because they fight for the interpreter.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
