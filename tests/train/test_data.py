import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets

from train.data import DATASETS, digits
from train.data.pipeline import train_batches

DIGITS = DATASETS["digits"]

IMPORTS_NO_TENSORFLOW = """
import sys
from pathlib import Path
import train.loop
from train.data import digits
print(len(digits.load(Path(sys.argv[1]), "train")), digits.load(Path(sys.argv[1]), "test")[0])
assert "tensorflow" not in sys.modules
"""


def rows(examples):
    """The images with their labels, as bytes that sort and compare."""
    return sorted(bytes([*np.ravel(example["image"]), example["label"]]) for example in examples)


@pytest.fixture(scope="module")
def train_examples(data_dir):
    return digits.load(data_dir, "train")


def test_splits_hold_every_digit_of_sklearn_once(data_dir, train_examples):
    original = sklearn.datasets.load_digits()
    expected = rows(
        {"image": image.astype(np.uint8), "label": label}
        for image, label in zip(original.images, original.target, strict=True)
    )

    test_examples = digits.load(data_dir, "test")

    assert len(train_examples) == 1437
    assert len(test_examples) == 360
    assert rows([*train_examples, *test_examples]) == expected


def test_every_class_has_its_share_of_the_test_split(data_dir):
    counts = np.bincount([example["label"] for example in digits.load(data_dir, "test")])

    assert counts.min() >= 34
    assert counts.max() <= 37


def test_data_set_is_written_once(data_dir, train_examples):
    (record,) = data_dir.rglob("*train.array_record*")
    written = record.stat().st_mtime_ns

    digits.load(data_dir, "train")

    assert record.stat().st_mtime_ns == written


def test_copy_of_another_process_is_taken(tmp_path, monkeypatch):
    prepare = digits.SklearnDigits.download_and_prepare

    def beaten_by_another_process(builder):
        prepare(builder)
        raise OSError("Directory not empty")

    monkeypatch.setattr(digits.SklearnDigits, "download_and_prepare", beaten_by_another_process)

    assert len(digits.load(tmp_path, "test")) == 360


def test_other_failures_to_write_are_raised(tmp_path, monkeypatch):
    def fail(builder):
        raise OSError("disk full")

    monkeypatch.setattr(digits.SklearnDigits, "download_and_prepare", fail)

    with pytest.raises(OSError, match="disk full"):
        digits.load(tmp_path, "test")


def test_constants_describe_the_training_pixels(train_examples):
    pixels = np.stack([example["image"] for example in train_examples])

    np.testing.assert_allclose(DIGITS.mean, pixels.mean(axis=(0, 1, 2)), atol=0.005)
    np.testing.assert_allclose(DIGITS.std, pixels.std(axis=(0, 1, 2)), atol=0.005)
    assert DIGITS.image_shape(DIGITS.image_size) == pixels.shape[1:]


def test_digits_are_fed_as_they_are(train_examples):
    image = train_examples[0]["image"]

    np.testing.assert_array_equal(
        DIGITS.augment(train_examples[0], 8, np.random.default_rng(0)), image
    )
    np.testing.assert_array_equal(DIGITS.crop(train_examples[0], 8), image)
    assert DIGITS.crop(train_examples[0], 32).shape == DIGITS.image_shape(32)


def test_one_pass_sees_every_example_once(train_examples):
    batches = train_batches(
        DIGITS, train_examples, batch_size=479, image_size=8, seed=0
    )  # 3 * 479 = 1,437
    images, labels = [], []
    for batch in (next(batches) for _ in range(3)):
        images.extend(batch["image"])
        labels.extend(batch["label"])

    seen = rows({"image": i, "label": y} for i, y in zip(images, labels, strict=True))
    assert seen == rows(train_examples)


def test_no_tensorflow_at_run_time(data_dir):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_NO_TENSORFLOW, str(data_dir)], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1437")
