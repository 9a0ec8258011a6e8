"""Any image classification data set that `tensorflow-datasets` has prepared.

What the training loop has to know of it is taken from the description that lies with the files and
from a part of the training images.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import tensorflow_datasets as tfds

from train.data import encoded, images, records
from train.data.augmentation import make_augment
from train.data.dataset import Dataset, Example

# Images of at most this height, all of one square shape, are looked at whole.
SMALL = 64
# Training images from which mean and deviation are taken.
NUM_MEASURED = 1000

T = TypeVar("T")


def make_dataset(builder: tfds.core.DatasetBuilder) -> Dataset:
    """Makes a data set of what is prepared.

    Args:
        builder: from `prepared.open_folder`.

    Raises:
        FileNotFoundError: if a file is missing or empty.
        ValueError: if an example is not one image, grey or in colours, with one label, if there
            is nothing to train on or nothing to test on, or if a file is damaged.
    """
    image, label = _only(builder, tfds.features.Image), _only(builder, tfds.features.ClassLabel)
    height, width, channels = _shape(builder, image)

    # What is looked at here is opened, and checked, once.
    @functools.cache
    def opened(split: str) -> records.Records:
        return _open(builder, split, image, label)

    splits = _splits(builder, opened)
    side = height if height == width else None
    is_small = side is not None and side <= SMALL

    def load(data_dir: Path | None, split: str) -> records.Records:
        del data_dir  # They have been found.
        return opened(splits[split])

    def decode(example: Example) -> np.ndarray:
        return encoded.decode(example["image"], channels, example["name"])

    def crop(example: Example, size: int) -> np.ndarray:
        if is_small:
            return images.resize(decode(example), size, size)
        return images.resized_centre(decode(example), size)

    def random_crop(example: Example, size: int, rng: np.random.Generator) -> np.ndarray:
        content, name = example["image"], example["name"]
        return encoded.random_resized_crop(content, channels, name, size, rng)

    mean, std = _moments(decode, load(None, "train"))
    return Dataset(
        num_classes=builder.info.features[label].num_classes,
        image_size=side or 224,
        channels=channels,
        mean=mean,
        std=std,
        load=load,
        augment=make_augment("shift-flip" if is_small else "crop-flip", crop, random_crop),
        crop=crop,
        random_crop=random_crop,
        version=builder.info.full_name,
    )


def _open(builder: tfds.core.DatasetBuilder, split: str, image: str, label: str) -> records.Records:
    name = builder.info.full_name.rpartition("/")[0]
    command = f"`python -m train.prepare {name}:{builder.version}`"
    return records.open_split(builder, split, command, image=image, label=label)


def _only(builder: tfds.core.DatasetBuilder, kind: type) -> str:
    """Finds the name of the feature of a kind: of those to learn from, or else of all."""
    features = builder.info.features
    # Not isinstance: masks for segmentation are images too.
    names = [name for name, feature in features.items() if type(feature) is kind]
    names = [name for name in names if name in (builder.info.supervised_keys or ())] or names
    if len(names) != 1:
        found = ", ".join(f"{name} ({type(f).__name__})" for name, f in features.items())
        raise ValueError(
            f"--dataset is {builder.info.full_name}, whose features are {found}, but exactly one "
            f"{kind.__name__} to learn from was expected: choose a data set for image "
            "classification."
        )
    return names[0]


def _shape(builder: tfds.core.DatasetBuilder, image: str) -> tuple[int | None, int | None, int]:
    feature = builder.info.features[image]
    if feature.np_dtype != np.uint8 or len(feature.shape) != 3 or feature.shape[2] not in (1, 3):
        raise ValueError(
            f"--dataset is {builder.info.full_name}, whose images are "
            f"{np.dtype(feature.np_dtype).name} of shape {feature.shape}, but must be uint8 of "
            "shape (height, width, 1) or (height, width, 3): choose another one, or convert it."
        )
    return feature.shape


def _splits(
    builder: tfds.core.DatasetBuilder, opened: Callable[[str], records.Records]
) -> dict[str, str]:
    """Says which splits are the ones to train and to test on."""
    name, splits = builder.info.full_name, builder.info.splits
    filled = [split for split in ("train", "test", "validation") if _count(builder, split)]
    if "train" not in filled:
        raise ValueError(
            f"--dataset is {name}, whose splits are {', '.join(splits) or 'none'}, but one called "
            "train, with examples, was expected: choose another data set or configuration."
        )
    for split in filled[1:]:
        # The labels of some competitions' test splits were never published: they are -1.
        examples = opened(split)
        if next(_readable(lambda example: example["label"], examples, range(len(examples)))) >= 0:
            return {"train": "train", "test": split}
    held_out = "train[90%:]"
    # Examples are shuffled when they are written, so that the last tenth is a random one.
    if builder.info.disable_shuffling or not _count(builder, held_out):
        raise ValueError(
            f"--dataset is {name}, which has no labelled split test or validation, and "
            f"{_count(builder, 'train')} examples of train that cannot be divided, because they "
            "are too few or not shuffled: choose another data set or configuration."
        )
    return {"train": "train[:90%]", "test": held_out}


def _readable(
    read: Callable[[Example], T], examples: Sequence[Example], indices: Iterable[int]
) -> Iterator[T]:
    """Reads what can be read: whether the rest may be passed over is for the training to say.

    Raises:
        ValueError: if nothing can be read.
    """
    problem = None
    is_any = False
    for index in indices:
        try:
            value = read(examples[index])
        except ValueError as error:
            problem = error
        else:
            is_any = True
            yield value
    if problem is not None and not is_any:
        raise problem


def _count(builder: tfds.core.DatasetBuilder, split: str) -> int:
    splits = builder.info.splits
    return splits[split].num_examples if split.partition("[")[0] in splits else 0


def _moments(
    decode: Callable[[Example], np.ndarray], examples: Sequence[Example]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation of the pixels, to which every image contributes the same."""
    # The same ones on every process, and in every part of a run.
    count = min(len(examples), NUM_MEASURED)
    chosen = np.linspace(0, len(examples) - 1, count, dtype=int).tolist()
    moments = [cv2.meanStdDev(image) for image in _readable(decode, examples, chosen)]
    means, deviations = (np.array(of_images)[..., 0] for of_images in zip(*moments, strict=True))
    mean = means.mean(axis=0)
    variance = (deviations**2 + means**2).mean(axis=0) - mean**2
    # Pixels are divided by it, and a channel may be the same everywhere.
    std = np.sqrt(np.maximum(variance, 1.0))
    return tuple(mean.tolist()), tuple(std.tolist())
