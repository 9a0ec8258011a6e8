"""What is done to single images: random views to train on, fixed ones to test on.

Images are uint8 arrays [height, width, channels], colours in the order red, green, blue.
"""

import dataclasses
import math

import cv2
import numpy as np

# Of a photo that is more than so many times as long as wide, the ends are not resized to test on.
_LONGEST = 8

# The pipeline runs one image in each of its threads; OpenCV's own threads would only compete.
cv2.setNumThreads(1)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes to the given size; an image that has it already is returned itself."""
    if image.shape[:2] == (height, width):
        return image
    # Bilinear interpolation looks at 2x2 pixels, so it skips some where an image shrinks to less
    # than half. Averaging over areas does not, but takes far longer.
    shrinks = image.shape[0] > 2 * height or image.shape[1] > 2 * width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    # OpenCV takes the width first, and drops the axis of a single channel.
    resized = cv2.resize(image, (width, height), interpolation=interpolation)
    return resized.reshape(height, width, image.shape[2])


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle of pixels in an image.

    Attributes:
        top: rows above it.
        left: columns on its left.
        height: its rows.
        width: its columns.
    """

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The first row below it."""
        return self.top + self.height

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Returns what lies in it, as a view."""
        return image[self.top : self.bottom, self.left : self.left + self.width]

    def scaled(self, factor: float) -> "Box":
        """Returns where it is in an image that is larger or smaller by a factor.

        Each edge is moved by at most half a pixel. It is not empty if it has a pixel or more there.
        """
        edges = (self.top, self.left, self.bottom, self.left + self.width)
        top, left, bottom, right = (math.floor(factor * edge + 0.5) for edge in edges)
        return Box(top, left, bottom - top, right - left)


def random_box(height: int, width: int, rng: np.random.Generator) -> Box:
    """Chooses a rectangle in an image, as Inception's training does.

    The rectangle has 8 to 100 % of the image's area, uniformly, and an aspect ratio of 3:4 to 4:3,
    uniformly in its logarithm.

    Args:
        height: the image's height.
        width: its width.
        rng: where the choice comes from.
    """
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * height * width
        aspect = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        crop_height = round(math.sqrt(area / aspect))
        crop_width = round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(rng.integers(height - crop_height, endpoint=True))
            left = int(rng.integers(width - crop_width, endpoint=True))
            return Box(top, left, crop_height, crop_width)
    # A panorama holds few such rectangles: take the largest in its middle.
    return _central(
        height, width, min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    )


def random_resized_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts out a random rectangle, see `random_box`, and resizes it to a square.

    Args:
        image: the image.
        size: height and width of the result.
        rng: where the choice comes from.
    """
    return resize(random_box(image.shape[0], image.shape[1], rng).cut(image), size, size)


def random_shift(image: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Pads with zeros on every side and cuts out the original size at a random place."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding:-padding, padding:-padding] = image
    top, left = rng.integers(2 * padding, size=2, endpoint=True)
    return padded[top : top + height, left : left + width]


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Swaps left and right, or does not, with equal chances."""
    # Many times faster than a view with negative strides, which has to be copied in the end.
    return cv2.flip(image, 1).reshape(image.shape) if rng.random() < 0.5 else image


def resized_centre(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` * 256 / 224 and cuts out the central square.

    Of a strip the ends are cut off first: resized, a row of 30,000 pixels would take gigabytes.
    """
    height, width = image.shape[:2]
    longest = _LONGEST * min(height, width)
    # A part has the same centre if it is odd where the strip is odd.
    image = _central(
        height, width, min(height, longest + height % 2), min(width, longest + width % 2)
    ).cut(image)
    height, width = image.shape[:2]
    scale = round(size * 256 / 224) / min(height, width)
    resized = resize(image, round(height * scale), round(width * scale))
    return _central(resized.shape[0], resized.shape[1], size, size).cut(resized)


def _central(height: int, width: int, box_height: int, box_width: int) -> Box:
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)
