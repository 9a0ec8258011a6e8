"""ImageNet (ILSVRC 2012), 1,281,167 photos of 1,000 classes, as `tensorflow-datasets` stores it.

It is read from ArrayRecord files, whose photos are JPEG files as they were; no TensorFlow is
needed for that. `python -m train.prepare imagenet` writes them.

References:
    Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
    Szegedy et al., "Going Deeper with Convolutions", CVPR 2015: the random crops.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data import encoded, images, prepared, records
from train.data.augmentation import make_augment
from train.data.dataset import Dataset, Example

NAME = "imagenet2012"
# Versions that differ in their splits only.
VERSION = "5.*.*"
# The labels of the challenge's own test split were never published.
SPLITS = {"train": "train", "test": "validation"}


def load(data_dir: Path | None, split: str) -> Sequence[Example]:
    """Opens a split; nothing is read yet.

    Args:
        data_dir: the folder of `tensorflow-datasets`; None for its default.
        split: "train", or "test" for the challenge's validation split.

    Returns:
        The examples, by index: "image" is a JPEG file as bytes.

    Raises:
        FileNotFoundError: if the split is not there in ArrayRecord files, or not all of it.
        ValueError: if it is damaged or empty.
    """
    builder = prepared.find(NAME, VERSION, data_dir)
    if builder is None or SPLITS[split] not in builder.info.splits:
        raise FileNotFoundError(_missing(prepared.folder(data_dir) / NAME, SPLITS[split]))
    return records.open_split(
        builder,
        SPLITS[split],
        "`python -m train.prepare imagenet`",
        image="image",
        label="label",
        file_name="file_name",
    )


def random_crop(example: Example, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random part of the photo."""
    return encoded.random_resized_crop(example["image"], 3, example["name"], size, rng)


def crop(example: Example, size: int) -> np.ndarray:
    """Returns the centre of the photo."""
    return images.resized_centre(encoded.decode(example["image"], 3, example["name"]), size)


def _missing(folder: Path, split: str) -> str:
    found = "does not exist"
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        found = f"holds {', '.join(names) or 'nothing'}"
    return (
        f"ImageNet's split {split!r} is not there: {folder} {found}, where a folder 5.x.x was "
        f"expected with dataset_info.json, features.json and {NAME}-{split}.array_record-* files, "
        "as tensorflow-datasets writes them with file_format='array_record' (not tfrecord). Name "
        f"the folder that holds {NAME} with --data-dir, or write them with "
        "`python -m train.prepare imagenet`."
    )


DATASET = Dataset(
    num_classes=1000,
    image_size=224,
    channels=3,
    # What everybody uses: 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225, times 255.
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    load=load,
    augment=make_augment("crop-flip", crop, random_crop),
    crop=crop,
    random_crop=random_crop,
)
