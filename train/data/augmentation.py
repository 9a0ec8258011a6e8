"""How the images to train on are changed at random, by name."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from train.data import images
from train.data.dataset import Example

AugmentationName = Literal["crop-flip", "crop", "shift-flip", "shift", "none"]
Augment = Callable[[Example, int, np.random.Generator], np.ndarray]


def make_augment(
    name: AugmentationName,
    crop: Callable[[Example, int], np.ndarray],
    random_crop: Augment,
) -> Augment:
    """Makes the function that returns an image to train on.

    Args:
        name: crop: a random part of the image. shift: the image to test on, moved by up to an
            eighth of its height. none: that image as it is. With -flip: mirrored or not.
        crop: takes an example and the size, and returns the image to test on.
        random_crop: takes a random generator as well, and returns a random part of the image.
    """
    move, _, flip = name.partition("-")

    def augment(example: Example, size: int, rng: np.random.Generator) -> np.ndarray:
        image = random_crop(example, size, rng) if move == "crop" else crop(example, size)
        if move == "shift":
            image = images.random_shift(image, -(-size // 8), rng)
        return images.random_flip(image, rng) if flip else image

    return augment
