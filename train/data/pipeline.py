"""Batches for training and for evaluation, fed by grain.

A batch is cut into equal parts, one after another, for the processes. What it holds depends on its
place in the run alone, so the parts together are what a single process would get.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import cv2
import grain
import numpy as np

from train.data.dataset import Dataset, Example
from train.text import first_line

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
    max_bad_examples: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Endless shuffled batches of augmented images.

    Every pass sees every example once, in another order. A batch may begin in one pass and end in
    the next, so that no example is dropped however large the batch.

    An example is bad if it cannot be read, decoded or resized, if memory is not enough for it, or
    if its label is out of range. Another one takes its place, at random, but such that this too
    depends on the place in the run alone.

    Args:
        dataset: says how an example becomes an image to train on.
        examples: the training split.
        batch_size: examples per batch, over all processes.
        image_size: height and width of the images.
        seed: the same seed gives the same batches, to the last bit.
        process_index: which part of each batch to return.
        process_count: the processes, which must divide the batch.
        first_batch: index of the batch to begin with, for a run that goes on.
        max_bad_examples: how many different examples of the split may be bad, of those that this
            process meets from here on. The batch that one more belongs to is a ValueError.

    Returns:
        An iterator over batches of "image", uint8, and "label", int32, with "bad_examples", a
        single int32: in how many rows of this part another example had to take the place. Its
        state, for `get_state` and `set_state`, counts the batches, so it is the same on every
        process.
    """

    def augment(index: int, rng: np.random.Generator) -> "Batch | _Bad":
        return _prepare(
            dataset, examples, index, lambda example: dataset.augment(example, image_size, rng)
        )

    # The generator that random_map hands out depends on the seed and on the place in the endless
    # stream, so it comes after repeat, and before anything is cut up for the processes.
    indices = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat()
    stream = indices.random_map(augment)

    def places(position: int) -> Iterable[int]:
        # No run gets to the middle of the stream, nor over a million millions of places. The next
        # place in the run would show the same view of the same photo twice. A prime number, so that
        # each attempt leads to another place in another pass.
        stand_ins = itertools.count(len(stream) // 2 + position, 10**12 + 39)
        return itertools.chain([position], stand_ins)

    parts = _Parts(
        stream,
        places,
        _nothing(dataset, image_size),
        num_batches=len(stream) // batch_size,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        bad_examples=_BadExamples(len(examples), max_bad_examples),
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
    max_bad_examples: int = 0,
) -> Iterator[Batch]:
    """Every example once, in order; what is left of the last batch is zeros.

    Args:
        dataset: says how an example becomes an image to test on.
        examples: the split.
        batch_size: examples per batch, over all processes.
        image_size: height and width of the images.
        process_index: which part of each batch to return.
        process_count: the processes, which must divide the batch.
        max_bad_examples: as in `train_batches`, but a bad example leaves zeros.

    Returns:
        As many batches on every process, with a "mask", float32, that is 1 for an example and 0
        for zeros: that may be all that a process has of the last batch. "bad_examples" counts those
        that bad examples have left.
    """

    def crop(index: int) -> "Batch | _Bad":
        example = _prepare(
            dataset, examples, index, lambda example: dataset.crop(example, image_size)
        )
        return (
            example if isinstance(example, _Bad) else {**example, "mask": np.ones((), np.float32)}
        )

    parts = _Parts(
        grain.MapDataset.range(len(examples)).map(crop),
        lambda position: [position],
        {**_nothing(dataset, image_size), "mask": np.zeros((), np.float32)},
        num_batches=math.ceil(len(examples) / batch_size),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        bad_examples=_BadExamples(len(examples), max_bad_examples),
    )
    return iter(_read_ahead(parts))


def _nothing(dataset: Dataset, image_size: int) -> Batch:
    """Returns what stands where there is no example."""
    return {
        "image": np.zeros(dataset.image_shape(image_size), np.uint8),
        "label": np.zeros((), np.int32),
    }


class _Bad(NamedTuple):
    """What comes instead of a bad example.

    Attributes:
        example: its index in the split.
        error: what is wrong with it.
    """

    example: int
    error: ValueError


def _prepare(
    dataset: Dataset,
    examples: Sequence[Example],
    index: int,
    view: Callable[[Example], np.ndarray],
) -> Batch | _Bad:
    try:
        example = examples[index]
        label = example["label"]
        if not 0 <= label < dataset.num_classes:
            raise ValueError(
                f"{example['name']} has the label {label}, where 0 to {dataset.num_classes - 1} "
                "was expected."
            )
        try:
            return {"image": view(example), "label": label}
        except (cv2.error, MemoryError) as error:
            reason = first_line(error) or "memory is not enough"
            raise ValueError(
                f"{example['name']} cannot be decoded or resized: {reason}."
            ) from error
    except ValueError as error:
        return _Bad(index, error)


class _BadExamples:
    """The different bad examples of a split that this process has met."""

    def __init__(self, num_examples: int, allowed: int) -> None:
        self._num_examples = num_examples
        self._allowed = allowed
        self._met: set[int] = set()

    def are_too_many(self, number: int) -> bool:
        """Whether so many different ones may not be passed over, as neither may be all."""
        return number > min(self._allowed, self._num_examples - 1)

    def add(self, bad: _Bad) -> None:
        """Takes note of one, which may have been met before.

        Raises:
            ValueError: if it is one too many.
        """
        self._met.add(bad.example)
        if self.are_too_many(len(self._met)):
            raise ValueError(
                f"{bad.error} Of the {self._num_examples} examples of the split, "
                f"{len(self._met)} that this process has met are bad, and --max-bad-examples is "
                f"{self._allowed}: repair the data, or raise this number to pass over them."
            ) from bad.error


class _Parts:
    """One process's parts of all batches, by the batch's index.

    Grain could batch single examples too. But its threads would hand them over one by one, which is
    slower, with tiny images several times; to stack them would take memory for the batch twice; and
    the state would count examples, other ones on each process.
    """

    def __init__(
        self,
        stream: grain.MapDataset[Batch | _Bad],
        places: Callable[[int], Iterable[int]],
        nothing: Batch,
        *,
        num_batches: int,
        batch_size: int,
        process_index: int,
        process_count: int,
        bad_examples: _BadExamples,
    ) -> None:
        if batch_size % process_count:
            raise ValueError(
                f"the batch size is {batch_size}, but must be a multiple of the number of "
                f"processes, {process_count}: change it, so that all get equal parts."
            )
        self._stream = stream
        # Where the example for a position is looked for, until a good one is found.
        self._places = places
        self._nothing = nothing
        self._num_batches = num_batches
        self._batch_size = batch_size
        self._size = batch_size // process_count
        self._offset = process_index * self._size
        self._bad_examples = bad_examples
        self._num_threads = _num_cores()
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="examples")

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> Batch:
        start = index * self._batch_size + self._offset
        batch: Batch = {
            name: np.zeros((self._size, *value.shape), value.dtype)
            for name, value in self._nothing.items()
        }

        def fill(rows: range) -> list[list[_Bad]]:
            bad_of_rows = []
            for row in rows:
                if start + row < len(self._stream):
                    example, bad = self._find(start + row)
                    for name, value in example.items():
                        batch[name][row] = value
                    if bad:
                        bad_of_rows.append(bad)
            return bad_of_rows

        rows = range(self._size)
        running: deque[Future[list[list[_Bad]]]] = deque()
        num_bad = 0
        for first in range(0, self._size, CHUNK):
            # All at once would keep a program that wants to end until the whole batch is made.
            if len(running) == 2 * self._num_threads:
                num_bad += self._count_bad(running.popleft())
            running.append(self._threads.submit(fill, rows[first : first + CHUNK]))
        for future in running:
            num_bad += self._count_bad(future)
        return {**batch, "bad_examples": np.asarray(num_bad, np.int32)}

    def _count_bad(self, filled: Future[list[list[_Bad]]]) -> int:
        bad_of_rows = filled.result()
        # In order, not by the threads: which one is too many does not depend on them.
        for bad in itertools.chain.from_iterable(bad_of_rows):
            self._bad_examples.add(bad)
        return len(bad_of_rows)

    def _find(self, position: int) -> tuple[Batch, list[_Bad]]:
        """Returns the example for a position, if there is one, and the bad ones before it."""
        bad: list[_Bad] = []
        for place in self._places(position):
            example = self._stream[place]
            if not isinstance(example, _Bad):
                return example, bad
            bad.append(example)
            if self._bad_examples.are_too_many(len({of.example for of in bad})):
                break
        return {}, bad


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
