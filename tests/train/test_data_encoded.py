import io

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


def test_photo_is_not_turned():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # Orientation: turn clockwise.

    assert encoded.decode(encode(photo(120, 160), exif=exif), 3, "photo").shape == (120, 160, 3)


JPEG = encode(photo(60, 90))


@pytest.mark.parametrize("content", [b"", b"GIF89a and so on", JPEG[:300], JPEG[:2]])
def test_damaged_photo_is_named(content):
    message = rf"n01_7.JPEG cannot be decoded: it has {len(content)} bytes .* prepare it again"
    with pytest.raises(ValueError, match=message):
        encoded.decode(content, 3, "n01_7.JPEG")
    with pytest.raises(ValueError, match=message):
        encoded.random_resized_crop(content, 3, "n01_7.JPEG", 16, np.random.default_rng(0))
