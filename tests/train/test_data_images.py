import numpy as np
import PIL.Image
import pytest

from train.data import images


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def ramp(height, width):
    """Red is the column, green the row, blue 255: an image that tells where a part comes from."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full((height, width), 255)], axis=-1).astype(np.uint8)


def test_resizing_to_the_same_size_does_nothing():
    image = ramp(10, 20)

    assert images.resize(image, 10, 20) is image


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_keeps_a_flat_image_flat(channels):
    flat = np.full((7, 9, channels), 77, np.uint8)

    np.testing.assert_array_equal(
        images.resize(flat, 12, 5), np.full((12, 5, channels), 77, np.uint8)
    )


def test_shrinking_averages_over_all_pixels():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, 3::8] = stripes[:, 4::8] = 200  # The two pixels that lie next to a new one's centre.

    np.testing.assert_allclose(images.resize(stripes, 8, 8), 50, atol=1)


def rectangle(crop):
    """Left, top, width and height of the part of a ramp that was resized to `crop`."""
    # A pixel of the crop is the mean of `scale` pixels around its centre.
    size = len(crop)
    x = crop[size // 2, :, 0].astype(float)
    y = crop[:, size // 2, 1].astype(float)
    width, height = ((axis[-5] - axis[4]) * size / (size - 9) for axis in (x, y))
    return x[4] - 4.5 * width / size, y[4] - 4.5 * height / size, width, height


def test_random_crop_is_a_rectangle_of_the_size_and_shape_that_is_usual(rng):
    image = ramp(200, 250)
    rectangles = []
    for _ in range(400):
        crop = images.random_resized_crop(image, 64, rng)
        assert crop.shape == (64, 64, 3)
        np.testing.assert_array_equal(crop[..., 2], 255)
        rectangles.append(rectangle(crop))

    left, top, width, height = np.transpose(rectangles)
    area = width * height / (200 * 250)
    assert 0.07 < area.min() < 0.12
    assert 0.9 < area.max() < 1.03
    # Uniform from 0.08 to 1, but of the largest rectangles fewer fit.
    assert 0.4 < area.mean() < 0.55
    assert 0.72 < (width / height).min() < 0.78
    assert 1.28 < (width / height).max() < 1.38
    np.testing.assert_allclose(np.log(width / height).mean(), 0, atol=0.05)
    assert left.min() < 5
    assert top.min() < 5
    assert (left + width).max() > 245
    assert (top + height).max() > 195
    np.testing.assert_allclose((left + width / 2).mean(), 125, atol=5)
    np.testing.assert_allclose((top + height / 2).mean(), 100, atol=5)


@pytest.mark.parametrize("turned", [False, True])
def test_random_crop_of_a_panorama_is_its_middle(rng, turned):
    image = np.zeros((30, 1000, 3), np.uint8)
    image[:, 480:520] = 255  # 40:30 is the widest rectangle allowed.

    crop = images.random_resized_crop(image.swapaxes(0, 1) if turned else image, 16, rng)

    np.testing.assert_array_equal(crop, 255)


def test_random_crop_of_a_single_pixel(rng):
    crop = images.random_resized_crop(np.full((1, 1, 3), 9, np.uint8), 8, rng)

    np.testing.assert_array_equal(crop, np.full((8, 8, 3), 9))


@pytest.mark.parametrize(
    "change",
    [
        lambda image, rng: images.random_resized_crop(image, 32, rng),
        lambda image, rng: images.random_shift(image, 4, rng),
        images.random_flip,
    ],
)
def test_random_changes_depend_on_the_generator_alone(change):
    image = ramp(40, 50)

    first, again = (
        [change(image, rng) for _ in range(20)]
        for rng in (np.random.default_rng(1), np.random.default_rng(1))
    )

    np.testing.assert_array_equal(first, again)
    assert len({view.tobytes() for view in first}) > 1


def test_half_of_the_images_are_flipped(rng):
    image = ramp(3, 5)
    views = [images.random_flip(image, rng) for _ in range(1000)]

    flipped = [view for view in views if view[0, 0, 0] == 4]
    assert 450 < len(flipped) < 550
    np.testing.assert_array_equal(flipped[0], image[:, ::-1])
    np.testing.assert_array_equal(next(v for v in views if v[0, 0, 0] == 0), image)


def test_shifts_reach_every_place_alike(rng):
    image = np.ones((6, 6, 1), np.uint8)
    image[2, 3] = 200
    places = {}
    for _ in range(2000):
        shifted = images.random_shift(image, 2, rng)
        assert shifted.shape == image.shape
        (row,), (column,) = np.nonzero(shifted[..., 0] == 200)
        places[row - 2, column - 3] = places.get((row - 2, column - 3), 0) + 1
        assert shifted.sum() == 199 + (6 - abs(row - 2)) * (6 - abs(column - 3))

    assert len(places) == 25
    assert min(places.values()) > 40  # 80 are expected.


@pytest.mark.parametrize(("height", "width"), [(240, 200), (200, 240), (220, 220), (120, 90)])
def test_centre_is_the_middle_seven_eighths(height, width):
    crop = images.resized_centre(ramp(height, width), 112)

    assert crop.shape == (112, 112, 3)
    left, top, *sizes = rectangle(crop)
    side = min(height, width) * 7 / 8
    np.testing.assert_allclose(sizes, side, atol=2)
    np.testing.assert_allclose([left, top], [(width - side) / 2, (height - side) / 2], atol=2)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(375, 500, 224), (333, 500, 224), (64, 64, 56), (90, 701, 64), (37, 260, 224), (1, 8, 5)],
)
def test_centre_is_that_of_the_whole_photo(height, width, size, turned, rng):
    shape = (width, height, 3) if turned else (height, width, 3)
    photo = rng.integers(0, 256, shape, dtype=np.uint8)
    whole = whole_resized(photo, size, images.resize)

    np.testing.assert_array_equal(images.resized_centre(photo, size), whole)


def whole_resized(photo, size, resize):
    """Resizes all of a photo, and cuts out the central square then."""
    scale = round(size * 256 / 224) / min(photo.shape[:2])
    resized = resize(photo, *(round(side * scale) for side in photo.shape[:2]))
    top, left = ((side - size) // 2 for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


def pillow_resize(image, height, width):
    resample = PIL.Image.Resampling.BILINEAR
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), resample))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 2000), (1, 2001), (2, 901), (30, 1000), (31, 1001), (150, 2503)]
)
def test_centre_of_a_strip_is_that_of_the_whole_strip(height, width, turned):
    """To a resized pixel; from one to the next, colours change by a few grey levels at most."""
    rows, columns = np.mgrid[:height, :width].astype(float)
    period = 3 * height + 4
    waves = [
        np.sin(2 * np.pi * (columns + at * height) / period + rows / period) for at in range(3)
    ]
    strip = np.rint(128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
    strip = strip.swapaxes(0, 1).copy() if turned else strip

    expected = whole_resized(strip, 112, pillow_resize)

    steps = [np.abs(np.diff(expected.astype(int), axis=axis)).max() for axis in (0, 1)]
    centre = images.resized_centre(strip, 112)
    np.testing.assert_allclose(centre.astype(int), expected, atol=max(steps) + 1)
    assert max(steps) < 8


def test_little_memory_is_enough_for_a_strip(monkeypatch):
    resize = images.resize

    def resize_little(image, height, width):
        assert height * width < 1_000_000
        return resize(image, height, width)

    monkeypatch.setattr(images, "resize", resize_little)
    strip = np.zeros((1, 30_000, 3), np.uint8)
    strip[:, 15_000:] = 200

    centre = images.resized_centre(strip, 224)

    # Each pixel becomes 256, and between the centres of two the colour changes evenly.
    places = 14_999.5 + (np.arange(-112, 112) + 0.5) / 256
    expected = np.interp(places, [14_999, 15_000], [0, 200])
    np.testing.assert_allclose(centre[:, :, 1], np.tile(expected, (224, 1)), atol=1)
