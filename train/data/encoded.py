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

# Pillow refuses larger images, and with it the loaders that most people use. Damaged headers claim
# up to 4,295 million pixels, for which 13 GB would be taken.
MAX_PIXELS = 178_956_970

# Markers of frames whose rows come from top to bottom: baseline, extended and progressive.
_PROGRESSIVE = 0xC2
_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)
# Markers of what follows the frame: the data of the image, and its end.
_SCAN, _END = b"\xff\xda", b"\xff\xd9"

# By how many eighths of their height and width libjpeg decodes photos while it is worth it: others
# than a half and less cost more than they save.
_EIGHTHS = (1, 2, 3, 4, 8)


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
        ValueError: if it cannot be decoded, ends early, or has more than `MAX_PIXELS`.
    """
    frame = _frame_of(content)
    if frame is not None:
        _check(content, frame, name)
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
        ValueError: as in `decode`, wherever the rectangle lies.
    """
    frame = _frame_of(content)
    if frame is None:
        return images.random_resized_crop(decode(content, channels, name), size, rng)
    _check(content, frame, name)
    box = images.random_box(frame.height, frame.width, rng)
    # The row below is looked at where colours are stored at half the resolution.
    num_rows = min(box.bottom + 1, frame.height)
    side = min(box.height, box.width)
    eighths = next((number for number in _EIGHTHS if side * number >= 8 * size), 8)
    # What libjpeg rounds up to, so that it takes these eighths and no more.
    smallest = -(-num_rows * eighths // 8), -(-frame.width * eighths // 8)
    rows = _decode_jpeg(frame.without_rows_below(content, num_rows), channels, name, smallest)
    return images.resize(box.scaled(eighths / 8).cut(rows), size, size)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What the header of a JPEG file says.

    Attributes:
        position: index of the byte where it says it.
        height: of the image.
        width: of the image.
        is_progressive: whether the data are those of a coarse image and of ever finer ones.
    """

    position: int
    height: int
    width: int
    is_progressive: bool

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
            is_progressive = content[segment + 1] == _PROGRESSIVE
            return _Frame(segment + 5, height, width, is_progressive) if is_usual else None
        segment += 2 + int.from_bytes(content[segment + 2 : segment + 4], "big")
    return None


def _check(content: bytes, frame: _Frame, name: str) -> None:
    """Refuses what libjpeg would decode, but with grey in the place of what is missing.

    Raises:
        ValueError: if data of the image are missing, or it has too many pixels to be one.
    """
    if frame.height * frame.width > MAX_PIXELS:
        claim = f"claims {frame.height:,} x {frame.width:,} pixels"
        raise _undecodable(content, name, f"{claim}, where at most {MAX_PIXELS:,} were expected")
    # The header may hold a small copy with markers of its own, but the data hold none.
    if content.rfind(_END, content.find(_SCAN, frame.position)) >= 0:
        return
    problem = "ends before the image does"
    if frame.is_progressive:  # It may have become no finer, of which libjpeg says nothing.
        raise _undecodable(content, name, problem)
    try:
        # If nothing but the marker is missing, libjpeg has nothing to complain of with it.
        simplejpeg.decode_jpeg(content + _END, "GRAY", strict=True)
    except ValueError as error:
        raise _undecodable(content, name, problem) from error


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
            min_factor=2,  # As `_EIGHTHS` says.
            strict=False,  # Photos of ImageNet have flaws that do no harm.
        )
    except ValueError as error:
        raise _undecodable(content, name) from error


def _undecodable(content: bytes | bytearray, name: str, problem: str | None = None) -> ValueError:
    start = bytes(content[:4])
    problem = problem or f"begins with {start!r}, where a JPEG or PNG file was expected"
    return ValueError(
        f"{name} cannot be decoded: it has {len(content)} bytes and {problem}. The data set is "
        "damaged: prepare it again."
    )
