import io
import json
import re
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from tests.train.commands import finish, lines_of, start
from train.data import DATASETS, dataset_of
from train.data.pipeline import eval_batches, train_batches

GREY = tfds.features.Image(shape=(12, 12, 1))
PHOTO = tfds.features.Image()
LABEL = tfds.features.ClassLabel(num_classes=4)


class Birds(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of the user's own, whose code training does not see."""

    VERSION = tfds.core.Version("2.1.0")

    def __init__(self, features, splits, *, in_order=False, **options):
        self._given = features, splits, in_order
        super().__init__(**options)

    def _info(self):
        features, _, in_order = self._given
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("photo", "kind") if "kind" in features else None,
            disable_shuffling=in_order,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self._given[1]}

    def _generate_examples(self, split):
        for index, example in enumerate(self._given[1][split]):
            # Bytes as they are would be taken for text.
            yield (
                index,
                {
                    name: io.BytesIO(value) if isinstance(value, bytes) else value
                    for name, value in example.items()
                },
            )


class NewerBirds(Birds, skip_registration=True):
    name = "birds"
    VERSION = tfds.core.Version("2.10.0")


class Nests(Birds, skip_registration=True):
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name, version=tfds.core.Version("1.0.0"))
        for name in ("full-size", "64px-v2")
    ]


def write(data_dir, features, splits, builder=Birds, **options):
    tfds.disable_progress_bar()
    builder(
        features, splits, data_dir=data_dir, file_format="array_record", **options
    ).download_and_prepare()


def file_of(pixels, kind="PNG"):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def grey_pixels(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 12, 12), dtype=np.uint8)


def grey_examples(number, seed=0, label=None):
    return [
        {"image": file_of(pixels), "label": index % 4 if label is None else label}
        for index, pixels in enumerate(grey_pixels(number, seed))
    ]


def write_grey(data_dir, splits=("train", "test"), number=20, **options):
    split_examples = {split: grey_examples(number, seed) for seed, split in enumerate(splits)}
    write(data_dir, {"image": GREY, "label": LABEL}, split_examples, **options)


def photos(number):
    """Photos of various sizes, each red to the left of its middle and blue to the right."""
    rng = np.random.default_rng(3)
    for _ in range(number):
        height, width = rng.integers(70, 110, size=2)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, : width // 2, 0] = rng.integers(100, 255)
        pixels[:, width // 2 :, 2] = rng.integers(100, 255)
        yield pixels


def sorted_rows(arrays):
    return sorted(np.asarray(array).tobytes() for array in arrays)


def assert_same_images(images, expected):
    assert sorted_rows(images) == sorted_rows(expected)


def test_small_grey_images(tmp_path):
    write_grey(tmp_path)

    dataset = dataset_of("birds", tmp_path)

    assert (dataset.num_classes, dataset.image_size, dataset.channels) == (4, 12, 1)
    assert dataset.version == "birds/2.1.0"
    for seed, split in enumerate(("train", "test")):
        examples = dataset.load(tmp_path, split)
        assert np.bincount([example["label"] for example in examples]).tolist() == [5] * 4
        images = [dataset.crop(example, 12) for example in examples]
        assert images[0].shape == (12, 12, 1)
        assert_same_images(images, grey_pixels(20, seed))


def test_small_images_are_moved_by_an_eighth_and_flipped(tmp_path):
    pixels = np.zeros((12, 12), np.uint8)
    pixels[6, 2] = 255
    examples = [{"image": file_of(pixels), "label": 0}]
    write(tmp_path, {"image": GREY, "label": LABEL}, {"train": examples, "test": examples})
    dataset = dataset_of("birds", tmp_path)
    example = dataset.load(tmp_path, "train")[0]

    rng = np.random.default_rng(0)
    places = set()
    for _ in range(1000):
        view = dataset.augment(example, 12, rng)[..., 0]
        places.update(zip(*np.nonzero(view), strict=True))

    # 12 / 8 is rounded up to 2.
    columns = {*range(5), *range(7, 12)}
    assert places == {(row, column) for row in range(4, 9) for column in columns}


def write_photos(data_dir, number=24, **options):
    examples = [
        {
            "photo": file_of(pixels, "JPEG"),
            "kind": index % 4,
            "family": 0,
            "mask": file_of(np.zeros((3, 3), np.uint8)),
            "parts": [{"name": "beak", "box": [1, 2]}],
        }
        for index, pixels in enumerate(photos(number))
    ]
    features = {
        "photo": PHOTO,
        "kind": LABEL,
        "family": tfds.features.ClassLabel(num_classes=2),
        "mask": tfds.features.LabeledImage(labels=2, shape=(None, None, 1)),
        "parts": tfds.features.Sequence(
            {"name": tfds.features.Text(), "box": tfds.features.Tensor(shape=(2,), dtype=np.int32)}
        ),
    }
    write(data_dir, features, {"train": examples, "test": examples[:8]}, **options)


def test_photos_of_various_sizes_with_more_than_one_label(tmp_path):
    write_photos(tmp_path)

    dataset = dataset_of("birds", tmp_path)

    assert (dataset.num_classes, dataset.image_size, dataset.channels) == (4, 224, 3)
    examples = dataset.load(tmp_path, "test")
    assert sorted(example["label"] for example in examples) == sorted(2 * [0, 1, 2, 3])
    # The middle is kept, the colours are red and blue in this order.
    for example in examples:
        image = dataset.crop(example, 32)
        assert image.shape == (32, 32, 3)
        assert image[:, :14, 0].min() > 80
        assert image[:, 18:, 2].min() > 80
        assert image[:, :14, 2].max() < 30
        assert image[..., 1].max() < 30
    # Random parts show much of one side or little of it.
    rng = np.random.default_rng(0)
    views = [dataset.augment(examples[0], 32, rng) for _ in range(200)]
    red = [np.mean(view[..., 0] > view[..., 2]) for view in views]
    assert min(red) < 0.2
    assert max(red) > 0.8
    is_flipped = [view[:, 0, 2].mean() > view[:, -1, 2].mean() for view in views]
    assert 20 < sum(is_flipped) < 180


def test_batches_of_photos(tmp_path):
    write_photos(tmp_path)
    dataset = dataset_of("birds", tmp_path)

    batch = next(
        train_batches(dataset, dataset.load(None, "train"), batch_size=6, image_size=16, seed=0)
    )
    assert batch["image"].shape == (6, 16, 16, 3)
    batches = list(eval_batches(dataset, dataset.load(None, "test"), batch_size=6, image_size=16))
    assert [batch["mask"].sum() for batch in batches] == [6, 2]


def test_moments_of_images_of_one_size_are_those_of_the_pixels(tmp_path):
    write_grey(tmp_path, number=40)
    dataset = dataset_of("birds", tmp_path)

    pixels = grey_pixels(40).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(dataset.std, [pixels.std()], rtol=1e-12)


def test_moments_count_every_image_the_same(tmp_path):
    write_photos(tmp_path)
    dataset = dataset_of("birds", tmp_path)

    decoded = [
        np.asarray(PIL.Image.open(io.BytesIO(file_of(pixels, "JPEG")))).astype(np.float64)
        for pixels in photos(24)
    ]
    mean = np.mean([image.mean(axis=(0, 1)) for image in decoded], axis=0)
    squares = np.mean([((image - mean) ** 2).mean(axis=(0, 1)) for image in decoded], axis=0)
    # Decoders round differently, and nothing green is in the photos but what JPEG adds.
    np.testing.assert_allclose(dataset.mean, mean, atol=0.5)
    np.testing.assert_allclose(dataset.std, np.maximum(np.sqrt(squares), 1), atol=0.5)
    pooled = np.concatenate([image.reshape(-1, 3) for image in decoded])
    assert abs(pooled.mean(axis=0) - mean).max() > 0.001


def test_moments_of_a_large_split_come_from_a_thousand_examples(tmp_path):
    write_grey(tmp_path, splits=("train",), number=1300)
    dataset = dataset_of("birds", tmp_path)

    # The last tenth, 130, is held out.
    train = dataset.load(tmp_path, "train")
    chosen = np.linspace(0, 1169, 1000).astype(int)
    pixels = np.array([dataset.crop(train[int(index)], 12) for index in chosen], np.float64)
    np.testing.assert_allclose(dataset.mean, [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(dataset.std, [pixels.std()], rtol=1e-12)
    assert len(set(chosen)) == 1000


def test_last_tenth_of_a_lone_split_is_held_out(tmp_path):
    write_grey(tmp_path, splits=("train",), number=40)
    dataset = dataset_of("birds", tmp_path)

    parts = [dataset.load(tmp_path, split) for split in ("train", "test")]

    assert [len(part) for part in parts] == [36, 4]
    images = [dataset.crop(example, 12) for part in parts for example in part]
    assert_same_images(images, grey_pixels(40))


def test_lone_split_that_is_not_shuffled_or_too_small_is_refused(tmp_path):
    write_grey(tmp_path / "ordered", splits=("train",), in_order=True)
    write_grey(tmp_path / "small", splits=("train",), number=2)

    for name in ("ordered", "small"):
        with pytest.raises(ValueError, match=r"birds/2\.1\.0, which has no labelled split test or"):
            dataset_of("birds", tmp_path / name)


def test_split_without_labels_is_not_tested_on(tmp_path):
    splits = {
        "train": grey_examples(20, seed=0),
        "test": grey_examples(6, seed=1, label=-1),
        "validation": grey_examples(8, seed=2),
    }
    features = {"image": GREY, "label": LABEL}
    write(tmp_path / "all", features, splits)
    del splits["validation"]
    write(tmp_path / "two", features, splits)

    dataset = dataset_of("birds", tmp_path / "all")
    images = [dataset.crop(example, 12) for example in dataset.load(None, "test")]
    assert_same_images(images, grey_pixels(8, seed=2))
    assert len(dataset.load(None, "train")) == 20
    dataset = dataset_of("birds", tmp_path / "two")
    assert [len(dataset.load(None, split)) for split in ("train", "test")] == [18, 2]


def test_newest_version_is_taken_unless_one_is_named(tmp_path):
    write_grey(tmp_path, number=20)
    write_grey(tmp_path, number=30, builder=NewerBirds)
    # What a preparation leaves that did not come to its end.
    (tmp_path / "birds" / "2.11.0").mkdir()

    for name, number in {
        "birds": 30,
        "Birds": 30,
        "birds:2.1.0": 20,
        "birds:2.1.*": 20,
        "birds:2.*.*": 30,
    }.items():
        assert len(dataset_of(name, tmp_path).load(None, "train")) == number


def test_configuration_is_the_default_one_unless_one_is_named(tmp_path):
    write_grey(tmp_path, number=30, builder=Nests, config="64px-v2")

    assert len(dataset_of("nests/64px-v2", tmp_path).load(None, "train")) == 30
    with pytest.raises(FileNotFoundError, match="--dataset is nests, which is neither"):
        dataset_of("nests", tmp_path)

    write_grey(tmp_path, number=20, builder=Nests, config="full-size")

    assert dataset_of("nests", tmp_path).version == "nests/full-size/1.0.0"
    assert dataset_of("nests/64px-v2:1.0.0", tmp_path).version == "nests/64px-v2/1.0.0"


def test_damaged_record_is_named(tmp_path):
    examples = [{"image": b"\x89PNG and no more", "label": 0}]
    write(tmp_path, {"image": GREY, "label": LABEL}, {"train": examples, "test": examples})

    with pytest.raises(
        ValueError,
        match=r"example 0 of the split train of birds/2\.1\.0 \(record 0 of .* cannot be ",
    ):
        dataset_of("birds", tmp_path)


UINT16 = tfds.features.Image(shape=(12, 12, 1), dtype=np.uint16)
FOUR = tfds.features.Image(shape=(None, None, 4))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": GREY}, r"features are image \(Image\), but exactly one ClassLabel"),
        ({"label": LABEL}, r"features are label \(ClassLabel\), but exactly one Image"),
        ({"image": GREY, "label": LABEL, "next": GREY}, "next .* exactly one Image"),
        ({"image": UINT16, "label": LABEL}, r"uint16 of shape \(12, 12, 1\), but must be uint8"),
        ({"image": FOUR, "label": LABEL}, r"uint8 of shape \(None, None, 4\), but must be"),
    ],
)
def test_other_features_are_refused(tmp_path, features, message):
    example = {name: 0 if name == "label" else grey_examples(1)[0]["image"] for name in features}
    write(tmp_path, features, {"train": [example], "test": [example]})

    with pytest.raises(ValueError, match=r"--dataset is birds/2\.1\.0, .*" + message) as error:
        dataset_of("birds", tmp_path)
    assert "\n" not in str(error.value)


def test_mask_is_no_image_to_learn_from(tmp_path):
    mask = tfds.features.LabeledImage(labels=2, shape=(12, 12, 1))
    examples = [{**example, "mask": example["image"]} for example in grey_examples(4)]
    features = {"mask": mask, "image": GREY, "label": LABEL}
    write(tmp_path, features, {"train": examples, "test": examples})

    dataset = dataset_of("birds", tmp_path)

    assert_same_images(
        [dataset.crop(example, 12) for example in dataset.load(None, "test")], grey_pixels(4)
    )


def test_missing_training_split_is_refused(tmp_path):
    write_grey(tmp_path, splits=("test", "validation"))

    with pytest.raises(
        ValueError, match="splits are test, validation, but one called train, with "
    ):
        dataset_of("birds", tmp_path)


def test_empty_training_split_is_refused(tmp_path):
    write_grey(tmp_path)
    info = tmp_path / "birds/2.1.0/dataset_info.json"
    content = json.loads(info.read_text())
    for split in content["splits"]:
        if split["name"] == "train":
            split["shardLengths"] = ["0"]
    info.write_text(json.dumps(content))

    with pytest.raises(ValueError, match="one called train, with examples, was expected"):
        dataset_of("birds", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("", "../x", "/etc/passwd", "birds/", "birds/../x", "birds:2", "birds\n", "two birds"),
        *("x:birds", "birds/a=1,b=2", "vögel", "fashion-mnsit", "birds:2.1.0/x"),
    ],
)
def test_what_is_no_name_is_refused(tmp_path, name):
    (tmp_path / "x" / "1.0.0").mkdir(parents=True)

    with pytest.raises(ValueError, match=re.escape(f"--dataset is {name!r}, but must be digits")):
        dataset_of(name, tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("imagenet", "imagenet2012"),
        ("fashion_mnist", "fashion-mnist"),
        ("fashion-mnsit", "fashion-mnist"),
        ("digit", "digits"),
        ("imagenette", None),
        ("emnist", None),
        ("cifar10", None),
    ],
)
def test_close_name_is_hinted_at(tmp_path, name, meant):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        dataset_of(name, tmp_path)

    assert re.findall(r"\(is (\S+) meant\?\)", str(error.value)) == [meant] * (meant is not None)


def test_what_is_not_prepared_is_said_to_be_had_by_preparing(tmp_path):
    folder = tmp_path / "my data"

    with pytest.raises(FileNotFoundError) as error:
        dataset_of("cifar10:3.0.2", folder)

    assert str(error.value) == (
        "--dataset is cifar10:3.0.2, which is neither digits, fashion-mnist, imagenet2012 nor "
        f"prepared in {folder}: prepare it with `python -m train.prepare cifar10:3.0.2 --data-dir "
        f"'{folder}'`, or name the folder that holds it with --data-dir."
    )


def test_other_format_is_refused(tmp_path):
    write_grey(tmp_path)
    info = tmp_path / "birds/2.1.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))

    with pytest.raises(
        FileNotFoundError, match=r"birds/2\.1\.0 cannot be read: .*tfrecord"
    ) as error:
        dataset_of("birds", tmp_path)
    assert "python -m train.prepare" in str(error.value)
    assert "\n" not in str(error.value)


def test_embedded_data_sets_are_found_without_data(tmp_path):
    for name, dataset in DATASETS.items():
        assert dataset_of(name, tmp_path) is dataset
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("augmentation", "expected"),
    [
        # Columns that a bright pixel in column 6 of 28 gets to; 28 / 8 is rounded up to 4.
        ("none", {6}),
        ("shift", set(range(2, 11))),
        ("shift-flip", {*range(2, 11), *range(17, 26)}),
    ],
)
def test_augmentation_that_is_asked_for(augmentation, expected, tmp_path):
    image = np.zeros((28, 28, 1), np.uint8)
    image[14, 6] = 255
    dataset = dataset_of("digits", tmp_path, augmentation)
    rng = np.random.default_rng(0)

    columns = set()
    for _ in range(500):
        columns.update(np.nonzero(dataset.augment({"image": image}, 28, rng))[1].tolist())

    assert columns == expected


@pytest.mark.parametrize(("augmentation", "flips"), [("crop", False), ("crop-flip", True)])
def test_random_parts_that_are_asked_for(augmentation, flips, tmp_path):
    # Brighter from left to right: no part of it is darker on its right, unless it is flipped.
    image = np.tile(np.arange(0, 250, 5, dtype=np.uint8)[:, np.newaxis], (50, 1, 1))
    dataset = dataset_of("fashion-mnist", tmp_path, augmentation)
    rng = np.random.default_rng(0)

    views = [dataset.augment({"image": image}, 16, rng) for _ in range(100)]

    assert {view.shape for view in views} == {(16, 16, 1)}
    assert len({int(view.max()) - int(view.min()) for view in views}) > 10
    falls = [view[0, 0, 0] > view[0, -1, 0] for view in views]
    assert any(falls) == flips
    assert not all(falls)


def test_run_on_a_prepared_data_set(tmp_path):
    write_photos(tmp_path / "data")
    options = (
        *("--dataset", "birds", "--data-dir", tmp_path / "data", "--image-size", 16),
        *("--batch-size", 16, "--epochs", 1.3, "--workdir", tmp_path / "run"),
    )

    (output,) = finish(start(*options, num_devices=1, program="tests.train.small"))

    assert "step 2/2" in output
    assert "of 8 examples" in output
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["dataset_version"] == "birds/2.1.0"
    assert record["num_train"] == 24
    assert 0 < lines_of(tmp_path / "run")[0]["train_loss"] < 10
