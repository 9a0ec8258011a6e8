"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28x28 pixels, 10 classes.

It is small enough to be held in memory as it is.

References:
    Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", arXiv 1708.07747 (2017).
"""

import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data import encoded, images, prepared, records
from train.data.augmentation import make_augment
from train.data.dataset import Dataset, Example

# Where Debian's package dataset-fashion-mnist puts the authors' files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class Arrays(Sequence[Example]):
    """Examples that lie in memory.

    Attributes:
        images: uint8 [N, height, width, channels].
        labels: integers [N].
        place: says for messages which example an index is, and where it lies.
        problems: by index, what is wrong with those that cannot be read.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        place: Callable[[int], str],
        problems: Mapping[int, ValueError],
    ) -> None:
        self.images = images
        self.labels = labels
        self.place = place
        self.problems = problems

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        if index in self.problems:
            raise self.problems[index]
        return {
            "image": self.images[index],
            "label": self.labels[index],
            "name": self.place(index),
        }


def load(data_dir: Path | None, split: str) -> Arrays:
    """Reads a split into memory.

    It is taken from where it is found first: `fashion_mnist` of `tensorflow-datasets` in the data
    folder, prepared in ArrayRecord files; the authors' files in the data folder's fashion-mnist;
    those of Debian's package.

    Args:
        data_dir: the folder of `tensorflow-datasets`; None for its default.
        split: "train" or "test".

    Raises:
        FileNotFoundError: if it is in none of these places, or not all of it.
        ValueError: if a file is not what its name says, or there are no examples.
    """
    builder = prepared.find("fashion_mnist", "3.*.*", data_dir)
    if builder is not None:
        command = "`python -m train.prepare fashion-mnist`"
        return _decoded(records.open_split(builder, split, command, image="image", label="label"))
    own_folder = prepared.folder(data_dir) / "fashion-mnist"
    for folder in (own_folder, DEBIAN_FOLDER):
        image_file, label_file = (folder / name for name in FILES[split])
        if image_file.is_file() and label_file.is_file():
            return _read(image_file, label_file, split)
    raise FileNotFoundError(
        f"Fashion-MNIST is neither in {DEBIAN_FOLDER} nor in {own_folder}: "
        f"expected are {' and '.join(FILES[split])}. Install them with `apt-get install "
        "dataset-fashion-mnist`, or download them from "
        "https://github.com/zalandoresearch/fashion-mnist into the latter folder; --data-dir names "
        "the one above it."
    )


def crop(example: Example, size: int) -> np.ndarray:
    """Returns the image, resized where another size is asked for."""
    return images.resize(example["image"], size, size)


def random_crop(example: Example, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random part of the image."""
    return images.random_resized_crop(example["image"], size, rng)


def _decoded(examples: records.Records) -> Arrays:
    pixels = np.zeros((len(examples), *DATASET.image_shape(DATASET.image_size)), np.uint8)
    labels = np.zeros(len(examples), np.int64)
    problems = {}
    for index in range(len(examples)):
        try:
            example = examples[index]
            image = encoded.decode(example["image"], DATASET.channels, example["name"])
        except ValueError as error:  # Whether it may be passed over is for the training to say.
            problems[index] = error
        else:
            pixels[index], labels[index] = image, example["label"]
    return Arrays(pixels, labels, examples.place, problems)


def _read(image_file: Path, label_file: Path, split: str) -> Arrays:
    pixels = _read_idx(image_file, num_axes=3)
    labels = _read_idx(label_file, num_axes=1)
    if len(pixels) != len(labels):
        raise ValueError(
            f"{image_file} holds {len(pixels)} images, but {label_file} {len(labels)} labels, "
            "where one for each image was expected: download both again."
        )
    if not len(labels):
        raise ValueError(
            f"{image_file} holds no images, but at least one was expected: download it again."
        )
    return Arrays(
        pixels[..., np.newaxis],
        labels,
        lambda index: f"example {index} of the split {split} ({image_file}, {label_file})",
        {},
    )


def _read_idx(file: Path, num_axes: int) -> np.ndarray:
    """Reads an array of bytes, which follows a magic number and its sizes, all big-endian."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(
            f"{file} is no whole gzip file ({error}), which was expected: download it again."
        ) from error
    header = np.frombuffer(content, ">u4", count=min(1 + num_axes, len(content) // 4))
    size = len(content) - header.nbytes
    # The third byte says that the values are bytes, the fourth how many axes there are.
    if len(header) <= num_axes or header[0] != 0x800 + num_axes or header[1:].prod() != size:
        raise ValueError(
            f"{file} begins with {header.tolist()}, and {size} bytes follow, where the magic "
            f"number {0x800 + num_axes}, {num_axes} sizes and their product in bytes were "
            "expected: download it again."
        )
    return np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(header[1:])


DATASET = Dataset(
    num_classes=10,
    image_size=28,
    channels=1,
    # As published for the images scaled to 0..1: 0.2860 and 0.3530.
    mean=(72.94,),
    std=(90.02,),
    load=load,
    augment=make_augment("shift-flip", crop, random_crop),
    crop=crop,
    random_crop=random_crop,
)
