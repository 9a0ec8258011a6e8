import io
import re

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import encoded, images

# What Pillow writes: 4:4:4, 4:2:2 and 4:2:0.
SUBSAMPLINGS = (0, 1, 2)


def photo(height, width, channels=3, seed=0):
    """Noise of a few pixels' size, so that rows and columns differ from their neighbours."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, channels), dtype=np.uint8)
    image = PIL.Image.fromarray(coarse.squeeze(axis=2) if channels == 1 else coarse)
    return image.resize((width, height), PIL.Image.Resampling.BICUBIC)


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(content, mode="RGB"):
    """What another decoder makes of a file."""
    image = PIL.Image.open(io.BytesIO(content))
    image.draft(mode, image.size)  # Grey is taken as it is stored, not made of the colours.
    pixels = np.asarray(image.convert(mode))
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def generators(seed):
    return np.random.default_rng(seed), np.random.default_rng(seed)


files = st.builds(
    lambda height, width, channels, **options: encode(photo(height, width, channels), **options),
    st.integers(8, 90),
    st.integers(8, 90),
    st.sampled_from([1, 3]),
    quality=st.integers(60, 98),
    subsampling=st.sampled_from(SUBSAMPLINGS),
    progressive=st.booleans(),
    optimize=st.booleans(),
    restart_marker_rows=st.integers(0, 2),
)


@given(files, st.sampled_from([1, 3]))
def test_decodes_what_pillow_decodes(content, channels):
    image = encoded.decode(content, channels, "photo")

    expected = pillow(content, "L" if channels == 1 else "RGB")
    assert image.shape == expected.shape
    np.testing.assert_allclose(image.astype(int), expected, atol=3)


@given(files, st.sampled_from([1, 3]), st.integers(40, 64), st.integers(0, 1000))
def test_random_view_is_that_of_the_whole_image(content, channels, size, seed):
    """At sizes that leave nothing to be gained by decoding a half."""
    rng, same = generators(seed)
    image = encoded.decode(content, channels, "photo")

    view = encoded.random_resized_crop(content, channels, "photo", size, rng)

    np.testing.assert_array_equal(view, images.random_resized_crop(image, size, same))
    assert rng.random() == same.random()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "CMYK"])
def test_other_files_are_decoded_whole(kind, channels):
    image = photo(60, 90, seed=1)
    content = encode(image, "PNG") if kind == "PNG" else encode(image.convert("CMYK"), quality=95)
    rng, same = generators(2)
    whole = encoded.decode(content, channels, "photo")

    assert whole.shape == (60, 90, channels)
    expected = pillow(content)
    if channels == 1:
        expected = expected @ [[0.299], [0.587], [0.114]]
    np.testing.assert_allclose(whole.astype(int), expected, atol=3)
    np.testing.assert_array_equal(
        encoded.random_resized_crop(content, channels, "photo", 16, rng),
        images.random_resized_crop(whole, 16, same),
    )


def test_header_of_a_rare_kind():
    """Markers may have any number of bytes 255 in front of them."""
    content = encode(photo(60, 90))
    filled = content[:2] + b"\xff\xff" + content[2:]
    rng, same = generators(0)

    view = encoded.random_resized_crop(filled, 3, "photo", 48, rng)

    expected = encoded.random_resized_crop(content, 3, "photo", 48, same)
    np.testing.assert_array_equal(view, expected)


def test_large_photo_is_decoded_at_a_lower_resolution(monkeypatch):
    """The view is that of the whole photo, to half a pixel; another one differs by 50 and more."""
    content = encode(photo(25, 32).resize((1280, 1000), PIL.Image.Resampling.BICUBIC))
    whole = encoded.decode(content, 3, "photo")
    shapes = []
    resize = images.resize
    monkeypatch.setattr(
        images, "resize", lambda image, *size: shapes.append(image.shape) or resize(image, *size)
    )
    for seed in range(20):
        rng, same = generators(seed)
        expected = images.random_resized_crop(whole, 64, same)
        shapes.clear()

        view = encoded.random_resized_crop(content, 3, "photo", 64, rng)

        (cut,) = shapes
        # No smaller than the view, but for rounding, and no more than twice as large.
        assert 63 <= min(cut[:2]) <= 129
        assert np.abs(view.astype(int) - expected).mean() < 5


@pytest.mark.parametrize(
    ("height", "width", "number"), [(375, 500, 30), (300, 1100, 30), (260, 8000, 1)]
)
def test_view_at_a_lower_resolution_is_in_its_place(height, width, number):
    """Colours tell the place: red from left to right of the rectangle, green from top to bottom."""
    offsets = []
    for seed in range(number):
        rng, same = generators(seed)
        box = images.random_box(height, width, same)
        across = 64 + 128 * (np.arange(width) + 0.5 - box.left) / box.width
        down = 64 + 128 * (np.arange(height) + 0.5 - box.top) / box.height
        colours = np.full((height, width, 3), 128.0)
        colours[..., 0], colours[..., 1] = across, down[:, np.newaxis]
        pixels = np.rint(colours.clip(0, 255)).astype(np.uint8)
        content = encode(PIL.Image.fromarray(pixels), quality=98, subsampling=0)
        edges = (box.left, box.top, box.left + box.width, box.bottom)
        expected = PIL.Image.open(io.BytesIO(content)).resize((32, 32), box=edges)

        view = encoded.random_resized_crop(content, 3, "photo", 32, rng)

        difference = view.astype(float) - np.asarray(expected)
        offsets.append(np.abs(difference.mean(axis=(0, 1))[:2]) / 128)

    # Edges are moved to whole pixels, of which there are 32 and more, by up to a half.
    assert np.max(offsets) < 0.018
    assert np.mean(offsets, axis=0).max() < 0.01


def test_photo_is_not_turned():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # Orientation: turn clockwise.

    assert encoded.decode(encode(photo(120, 160), exif=exif), 3, "photo").shape == (120, 160, 3)


JPEG = encode(photo(60, 90))


@pytest.mark.parametrize("content", [b"", b"GIF89a and so on", JPEG[:300], JPEG[:2]])
def test_damaged_photo_is_named(content):
    assert_refused(content, "")


def assert_refused(content, problem):
    """As one to test on, and as one to train on, wherever the rectangle lies."""
    length = len(content)
    message = rf"n01_7.JPEG cannot be decoded: it has {length} bytes .*{problem}.* prepare it again"
    with pytest.raises(ValueError, match=message):
        encoded.decode(content, 3, "n01_7.JPEG")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        with pytest.raises(ValueError, match=message):
            encoded.random_resized_crop(content, 3, "n01_7.JPEG", 16, rng)


KINDS = {
    "baseline": {},
    "restarts": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
}


def with_small_copy(content):
    """As cameras write it, into a segment of the header."""
    small = b"Exif\x00\x00" + encode(photo(16, 16))
    return content[:2] + b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small + content[2:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [lambda content: content, with_small_copy])
def test_photo_that_ends_early_is_refused(change, kind):
    content = change(encode(photo(120, 160), **KINDS[kind]))
    assert encoded.decode(content, 3, "photo").shape == (120, 160, 3)

    for length in np.linspace(len(content) // 8, len(content) - 40, 12, dtype=int).tolist():
        with pytest.raises(OSError, match=r"(?i)truncated"):
            pillow(content[:length])
        assert_refused(content[:length], "")
    assert_refused(content[: len(content) // 2], "and ends before the image does")


def test_progressive_photo_that_ends_between_two_scans_is_refused():
    content = encode(photo(120, 160), progressive=True)
    scans = [found.start() for found in re.finditer(b"\xff\xda", content)]
    # Tables come before a scan.
    ends = [content.rindex(b"\xff\xc4", 0, scan) for scan in scans[1:]]
    assert len(ends) > 5

    for end in ends:
        assert_refused(content[:end], "and ends before the image does")


@pytest.mark.parametrize("kind", ["baseline", "restarts"])
def test_photo_without_the_marker_of_its_end_is_decoded(kind):
    content = encode(photo(120, 160), **KINDS[kind])

    image = encoded.decode(content[:-2], 3, "photo")

    np.testing.assert_array_equal(image, encoded.decode(content, 3, "photo"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "flaw",
    [
        lambda content: content[:-2] + b"\x12\x34" + content[-2:],
        lambda content: content + bytes(10_000),
        lambda content: content + JPEG[:-100],  # Of cameras that store a second view.
    ],
)
def test_flaws_that_do_no_harm_are_passed_over(flaw, kind):
    content = encode(photo(120, 160), **KINDS[kind])
    rng, same = generators(0)

    image = encoded.decode(flaw(content), 3, "photo")
    view = encoded.random_resized_crop(flaw(content), 3, "photo", 48, rng)

    np.testing.assert_allclose(image.astype(int), pillow(content), atol=3)
    np.testing.assert_array_equal(view, images.random_resized_crop(image, 48, same))


def test_photo_that_claims_too_many_pixels_is_refused():
    content = bytearray(JPEG)
    size = JPEG.index(b"\xff\xc0") + 5
    content[size : size + 4] = (20_000).to_bytes(2, "big") + (10_000).to_bytes(2, "big")
    with pytest.raises(PIL.Image.DecompressionBombError, match=f"limit of {encoded.MAX_PIXELS} "):
        pillow(bytes(content))

    assert_refused(
        bytes(content), "claims 20,000 x 10,000 pixels, where at most 178,956,970 were expected"
    )
