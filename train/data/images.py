"""What is done to single images: decoding, random views to train on, fixed ones to test on.

Images are uint8 arrays [height, width, channels], colours in the order red, green, blue.
"""

import math

import cv2
import numpy as np

# The pipeline runs one image in each of its threads; OpenCV's own threads would only compete.
cv2.setNumThreads(1)


def decode_jpeg(encoded: bytes, name: str) -> np.ndarray:
    """Decodes a JPEG file, whatever its colour space, to [height, width, 3].

    Args:
        encoded: the file's content.
        name: what to call it where it cannot be decoded.

    Raises:
        ValueError: if it cannot be decoded.
    """
    # Whether a photo is turned as its EXIF data say makes a difference to the network, and most
    # published figures come from decoders that leave it as it is stored.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags) if encoded else None
    if image is None:
        raise ValueError(
            f"{name} cannot be decoded: it has {len(encoded)} bytes and begins with "
            f"{encoded[:4]!r}, where a JPEG file was expected. The data set is damaged: prepare "
            "it again."
        )
    return image


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


def random_resized_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts out a random rectangle and resizes it to a square, as Inception's training does.

    The rectangle has 8 to 100 % of the image's area, uniformly, and an aspect ratio of 3:4 to 4:3,
    uniformly in its logarithm.

    Args:
        image: the image.
        size: height and width of the result.
        rng: where the choice comes from.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * height * width
        aspect = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        crop_height = round(math.sqrt(area / aspect))
        crop_width = round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = rng.integers(height - crop_height, endpoint=True)
            left = rng.integers(width - crop_width, endpoint=True)
            return resize(image[top : top + crop_height, left : left + crop_width], size, size)
    # A panorama holds few such rectangles: take the largest in its middle.
    central = _central(image, min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3)))
    return resize(central, size, size)


def random_shift(image: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Pads with zeros on every side and cuts out the original size at a random place."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding:-padding, padding:-padding] = image
    top, left = rng.integers(2 * padding, size=2, endpoint=True)
    return padded[top : top + height, left : left + width]


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Swaps left and right, or does not, with equal chances."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def resized_centre(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` * 256 / 224 and cuts out the central square."""
    height, width = image.shape[:2]
    scale = round(size * 256 / 224) / min(height, width)
    return _central(resize(image, round(height * scale), round(width * scale)), size, size)


def _central(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top = (image.shape[0] - height) // 2
    left = (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
