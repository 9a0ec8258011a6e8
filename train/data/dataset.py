"""What the training loop has to know of a data set."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A labelled image data set.

    Attributes:
        num_classes: number of labels, which run from 0.
        image_size: height and width of what goes into the network, where nothing else is asked for.
        channels: 1 for grey, 3 for colours.
        mean: mean of the training pixels, per channel, in the units of the stored integers.
        std: their standard deviation.
        load: takes the data folder (None: the default of `tensorflow-datasets`) and the split's
            name, "train" or "test", and returns the examples by index, each with an "image", a
            "label" and a "name", which says in messages which one it is and where it lies. One that
            cannot be read is a ValueError. A data set that comes with a package is prepared where
            it is not there yet; for any other a FileNotFoundError says what was expected where.
        augment: takes an example, the size and a random generator, and returns an image to train
            on, uint8 [size, size, channels]. It depends on nothing else, and runs in many threads.
            An image that cannot be decoded is a ValueError.
        crop: takes an example and the size, and returns the image to test on, of the same kind.
        random_crop: as `augment`, but always a random part of the image, and never flipped.
        version: name, configuration and version of the files that are read, where the name that the
            user gives leaves these open; a run goes on with no others.
    """

    num_classes: int
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Callable[[Path | None, str], Sequence[Example]]
    augment: Callable[[Example, int, np.random.Generator], np.ndarray]
    crop: Callable[[Example, int], np.ndarray]
    random_crop: Callable[[Example, int, np.random.Generator], np.ndarray]
    version: str | None = None

    def image_shape(self, size: int) -> tuple[int, int, int]:
        """Returns height, width and channels of an image of the given size."""
        return (size, size, self.channels)
