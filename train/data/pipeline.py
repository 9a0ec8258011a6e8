"""Batches for training and for evaluation, fed by grain."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from train.data.dataset import Example

Batch = dict[str, np.ndarray]


def train_batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches.

    Every pass sees every example once, in another order. A batch may begin in one pass and end in
    the next, so that no example is dropped however large the batch.

    Args:
        examples: the training split.
        batch_size: examples per batch.
        seed: the same seed gives the same batches.
    """
    dataset = (
        grain.MapDataset.source(examples)
        .seed(seed)
        .map(_image_and_label)
        .shuffle()
        .repeat()
        .batch(batch_size)
    )
    return iter(dataset.to_iter_dataset())


def eval_batches(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """Every example once, in order; the last batch is filled up with zeros.

    Args:
        examples: the split.
        batch_size: examples per batch.

    Returns:
        Batches with a "mask" that is 1 for an example and 0 for what fills up.
    """
    dataset = grain.MapDataset.source(examples).map(_image_and_label).batch(batch_size)
    for batch in dataset.to_iter_dataset():
        size = len(batch["label"])
        batch["mask"] = np.ones(size, np.float32)
        yield {name: _fill_up(array, batch_size - size) for name, array in batch.items()}


def _image_and_label(example: Example) -> Batch:
    return {"image": example["image"], "label": np.asarray(example["label"], np.int32)}


def _fill_up(array: np.ndarray, missing: int) -> np.ndarray:
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
