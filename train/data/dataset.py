"""What the training loop has to know of a data set."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A labelled image data set that `tensorflow-datasets` reads.

    Attributes:
        num_train: examples of the split "train".
        num_test: examples of the split "test".
        num_classes: number of labels, which run from 0.
        image_shape: height, width and channels of an image.
        mean: mean of the training pixels, per channel, in the units of the stored integers.
        std: their standard deviation.
        load: takes the data folder (None: the default of `tensorflow-datasets`) and the split's
            name, prepares the data set where it is not there yet, and returns the examples, each
            with an "image" and a "label".
    """

    num_train: int
    num_test: int
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Callable[[Path | None, str], Sequence[Example]]
