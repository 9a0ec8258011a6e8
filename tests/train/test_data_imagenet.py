import collections
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.train import tiny_imagenet
from train.data import DATASETS
from train.data.pipeline import eval_batches, train_batches

IMAGENET = DATASETS["imagenet2012"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    tiny_imagenet.write(folder, num_train=32, num_validation=16)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy to damage."""
    shutil.copytree(folder / "imagenet2012", tmp_path / "imagenet2012")
    return tmp_path


def test_tiny_imagenet_is_what_the_real_builder_reads(folder, tmp_path):
    builder = tfds.builder("imagenet2012", data_dir=folder, file_format="array_record")

    assert builder.__class__.__module__.startswith("tensorflow_datasets.datasets.imagenet2012")
    assert builder.is_prepared()
    example = builder.as_data_source("validation")[0]
    assert example["image"].dtype == np.uint8
    assert example["file_name"].startswith(b"ILSVRC2012_val_")

    tfds.builder("imagenet2012", data_dir=tmp_path).info.features.save_config(tmp_path)
    for file in ("features.json", "label.labels.txt"):
        written = (folder / "imagenet2012" / "5.1.0" / file).read_text()
        assert written == (tmp_path / file).read_text()


@pytest.mark.parametrize(("split", "number"), [("train", 32), ("test", 16)])
def test_splits(folder, split, number):
    examples = IMAGENET.load(folder, split)

    counts = collections.Counter(example["label"] for example in examples)
    assert counts == dict.fromkeys(tiny_imagenet.LABELS, number // 8)


def test_older_version_is_read_too(copy):
    (copy / "imagenet2012/5.1.0").rename(copy / "imagenet2012/5.0.0")
    info = copy / "imagenet2012/5.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("5.1.0", "5.0.0"))

    assert len(IMAGENET.load(copy, "train")) == 32


def assert_label_is_visible(image, label):
    """The mean of a channel is low or high, as the label's bits say: red is the lowest."""
    high = image.mean(axis=(0, 1)) > 127
    assert tiny_imagenet.LABELS[int(np.packbits(high, bitorder="little")[0])] == label


def test_images_are_fed_in_red_green_blue(folder):
    rng = np.random.default_rng(0)
    for example in IMAGENET.load(folder, "train"):
        for image in (IMAGENET.augment(example, 64, rng), IMAGENET.crop(example, 64)):
            assert image.shape == IMAGENET.image_shape(64)
            assert image.dtype == np.uint8
            assert_label_is_visible(image, example["label"])


def test_processes_together_train_on_what_one_would(folder):
    examples = IMAGENET.load(folder, "train")
    options = {"batch_size": 24, "image_size": 32, "seed": 1}
    single = train_batches(IMAGENET, examples, **options)
    parts = [
        train_batches(IMAGENET, examples, **options, process_index=index, process_count=2)
        for index in range(2)
    ]

    for _ in range(4):
        expected, *together = (next(batches) for batches in (single, *parts))
        for name, array in expected.items():
            if name != "bad_examples":
                np.testing.assert_array_equal(np.concatenate([p[name] for p in together]), array)


def test_evaluation_sees_every_photo(folder):
    examples = IMAGENET.load(folder, "test")

    batches = list(eval_batches(IMAGENET, examples, batch_size=12, image_size=32))

    assert sum(batch["mask"].sum() for batch in batches) == 16
    for image, label in zip(batches[0]["image"], batches[0]["label"], strict=True):
        assert_label_is_visible(image, label)


def test_damaged_photo_is_named():
    example = {"image": b"\xff\xd8 and no more", "label": 3, "name": "n01440764_18.JPEG"}

    with pytest.raises(ValueError, match=r"n01440764_18.JPEG cannot be decoded"):
        IMAGENET.crop(example, 32)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        IMAGENET.load(tmp_path / "data", "train")

    message = str(error.value)
    assert f"{tmp_path / 'data' / 'imagenet2012'} does not exist" in message
    assert "5.x.x" in message
    assert "imagenet2012-train.array_record-*" in message
    assert "--data-dir" in message


def test_files_in_another_format_are_not_taken(copy):
    info = copy / "imagenet2012/5.1.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))

    with pytest.raises(FileNotFoundError, match=r"holds 5\.1\.0, .* \(not tfrecord\)"):
        IMAGENET.load(copy, "train")


def test_missing_split_is_named(copy):
    info = copy / "imagenet2012/5.1.0/dataset_info.json"
    content = json.loads(info.read_text())
    content["splits"] = [split for split in content["splits"] if split["name"] == "train"]
    info.write_text(json.dumps(content))

    assert len(IMAGENET.load(copy, "train")) == 32
    with pytest.raises(FileNotFoundError, match=r"imagenet2012-validation\.array_record"):
        IMAGENET.load(copy, "test")


def test_constants_are_the_usual_ones():
    np.testing.assert_allclose(np.divide(IMAGENET.mean, 255), [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(np.divide(IMAGENET.std, 255), [0.229, 0.224, 0.225], rtol=1e-6)
