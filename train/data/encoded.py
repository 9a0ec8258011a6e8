"""Images that are still files: JPEG, or anything else that OpenCV reads.

Decoding JPEG files is most of what feeding ImageNet costs, so of these no more is decoded than a
view needs: nothing below it, and nothing finer than twice what it is reduced to.
"""

import dataclasses
import struct

import cv2
import numpy as np
import simplejpeg

from train.data import images

# Markers of frames whose rows come from top to bottom: baseline, extended and progressive.
_FRAMES = (0xC0, 0xC1, 0xC2)


def decode(content: bytes, channels: int, name: str) -> np.ndarray:
    """Decodes a file.

    Args:
        content: the file's content.
        channels: 1 for grey, 3 for red, green and blue, whatever the file has.
        name: what to call it where it cannot be decoded.

    Returns:
        The image, uint8 [height, width, channels]. Whatever its EXIF data say, it is not turned:
        most published figures come from decoders that leave photos as they are stored.

    Raises:
        ValueError: if it cannot be decoded.
    """
    if _frame_of(content) is not None:
        return _decode_jpeg(content, channels, name)
    colours = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    flags = colours | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:  # It has no bytes, or too many pixels for OpenCV.
        raise _undecodable(content, name) from error
    if image is None:
        raise _undecodable(content, name)
    # OpenCV drops the axis of a single channel.
    return image.reshape(*image.shape[:2], channels)


def random_resized_crop(
    content: bytes, channels: int, name: str, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Decodes a random rectangle and resizes it to a square: see `images.random_resized_crop`.

    Args:
        content: as in `decode`.
        channels: as in `decode`.
        name: as in `decode`.
        size: height and width of the result.
        rng: where the choice comes from. The same state chooses the same rectangle as for the
            decoded image.

    Raises:
        ValueError: if it cannot be decoded.
    """
    frame = _frame_of(content)
    if frame is None:
        return images.random_resized_crop(decode(content, channels, name), size, rng)
    box = images.random_box(frame.height, frame.width, rng)
    # The row below is looked at where colours are stored at half the resolution.
    num_rows = min(box.bottom + 1, frame.height)
    smallest = -(-num_rows * size // box.height), -(-frame.width * size // box.width)
    rows = _decode_jpeg(frame.without_rows_below(content, num_rows), channels, name, smallest)
    return images.resize(box.scaled(rows.shape[0] / num_rows).cut(rows), size, size)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What the header of a JPEG file says.

    Attributes:
        position: index of the byte where it says it.
        height: of the image.
        width: of the image.
    """

    position: int
    height: int
    width: int

    def without_rows_below(self, content: bytes, num_rows: int) -> bytearray:
        """Makes the header say that the image ends after so many rows.

        Decoders stop there, and pass over the rest of the data. (libjpeg can be told to stop, but
        no Python package has a function for it.)
        """
        shortened = bytearray(content)
        shortened[self.position : self.position + 2] = num_rows.to_bytes(2, "big")
        return shortened


def _frame_of(content: bytes) -> _Frame | None:
    """Reads the header of a JPEG file; None if it is none, or of a rare kind."""
    # Segments follow one another: 255 and a marker, the length of the rest in two bytes, the rest.
    # That of a frame begins with the bits of a value, height, width and the number of channels.
    segment = 2 if content[:2] == b"\xff\xd8" else len(content)
    while segment + 10 <= len(content) and content[segment] == 0xFF != content[segment + 1]:
        if content[segment + 1] in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", content, segment + 5)
            # Four are the inks of a printer, and an image without pixels is none.
            is_usual = channels in (1, 3) and height and width
            return _Frame(segment + 5, height, width) if is_usual else None
        segment += 2 + int.from_bytes(content[segment + 2 : segment + 4], "big")
    return None


def _decode_jpeg(
    content: bytes | bytearray, channels: int, name: str, smallest: tuple[int, int] | None = None
) -> np.ndarray:
    """Decodes a JPEG file, at a half, a quarter or so if that is no smaller than the smallest."""
    min_height, min_width = smallest or (0, 0)
    try:
        return simplejpeg.decode_jpeg(
            content,
            "GRAY" if channels == 1 else "RGB",
            min_height=min_height,
            min_width=min_width,
            min_factor=2,  # Others than a half and less cost more than they save.
            strict=False,  # Photos of ImageNet have flaws that do no harm.
        )
    except ValueError as error:
        raise _undecodable(content, name) from error


def _undecodable(content: bytes | bytearray, name: str) -> ValueError:
    return ValueError(
        f"{name} cannot be decoded: it has {len(content)} bytes and begins with "
        f"{bytes(content[:4])!r}, where a JPEG or PNG file was expected. The data set is damaged: "
        "prepare it again."
    )
