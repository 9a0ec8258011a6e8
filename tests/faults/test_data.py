"""Broken data: photos, labels, records, files and folders."""

import dataclasses
import io
import itertools
import json
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import photos
from tests.train import tiny_imagenet
from tests.train.batches import assert_same, join
from tests.train.test_data_by_name import (
    GREY,
    LABEL,
    Birds,
    file_of,
    grey_examples,
    grey_pixels,
    write,
    write_grey,
)
from tests.train.test_data_fashion_mnist import FashionMnist, idx, made_up, write_idx
from train.data import DATASETS, dataset_of, encoded, fashion_mnist, pipeline
from train.data.pipeline import eval_batches, train_batches

pytestmark = pytest.mark.faults

DIGITS, FASHION, IMAGENET = (DATASETS[n] for n in ("digits", "fashion-mnist", "imagenet2012"))
NO_PHOTO = b"\xff\xd8 and no more"
SIZES = {"batch_size": 8, "image_size": 16}
# What loads the data set of a name, and the folder in which its files are.
LOADS = {
    "imagenet2012": IMAGENET.load,
    "sklearn_digits": DIGITS.load,
    "birds": lambda folder, split: dataset_of("birds", folder).load(folder, split),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A data folder without a fault, with the data sets of LOADS."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_imagenet.write(folder, num_train=32, num_validation=16)
    DIGITS.load(folder, "train")
    write_grey(folder)
    return folder


@pytest.fixture
def copy(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "data")


@pytest.fixture(autouse=True)
def no_debian(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")


class Loose(photos.Imagenet2012, skip_registration=True):
    """ImageNet, but one more label can be written."""

    name = "imagenet2012"

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1001),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


def write_imagenet(folder, sound, changes):
    """Writes the sound ImageNet, whose order stays, with other values by split and index."""
    tfds.disable_progress_bar()
    written = {}
    for split, name in (("train", "train"), ("test", "validation")):
        written[name] = [
            {
                "image": io.BytesIO(example["image"]),
                "label": example["label"],
                "file_name": example["file_name"].decode(),
                **changes.get((split, index), {}),
            }
            for index, example in enumerate(IMAGENET.load(sound, split))
        ]
    Loose(folder, written).download_and_prepare()


def shard_of(folder, name, split="train"):
    (shard,) = (folder / name).rglob(f"*-{split}.array_record*")
    return shard


def records_of(shard):
    reader = ArrayRecordReader(str(shard))
    records = reader.read_all()
    reader.close()
    return records


def write_records(shard, records):
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# Which example it is, and where it lies.


def test_photo_that_cannot_be_decoded_is_named(sound, tmp_path):
    write_imagenet(tmp_path, sound, {("train", 5): {"image": io.BytesIO(NO_PHOTO)}})
    examples = IMAGENET.load(tmp_path, "train")

    with pytest.raises(ValueError, match="cannot be decoded") as error:
        list(itertools.islice(train_batches(IMAGENET, examples, **SIZES, seed=0), 4))

    message = one_line(error)
    file_name = IMAGENET.load(sound, "train")[5]["file_name"].decode()
    assert message.startswith(
        f"{file_name}, example 5 of the split train of imagenet2012/5.1.0 "
        f"(record 5 of {shard_of(tmp_path, 'imagenet2012')}) cannot be decoded: it has 14 bytes"
    )
    assert "--max-bad-examples is 0: repair the data, or raise this number" in message


@pytest.mark.parametrize("label", [-1, 1000])
def test_label_out_of_range_is_named(label, sound, tmp_path):
    write_imagenet(tmp_path, sound, {("test", 9): {"label": label}})
    examples = IMAGENET.load(tmp_path, "test")

    with pytest.raises(ValueError, match=f"has the label {label}, where 0 to 999 was") as error:
        list(eval_batches(IMAGENET, examples, **SIZES))

    message = one_line(error)
    assert "example 9 of the split validation of imagenet2012/5.1.0 (record 9 of " in message
    assert str(shard_of(tmp_path, "imagenet2012", "validation")) in message


def test_label_out_of_range_in_the_files_of_fashion_mnist_is_named(tmp_path):
    folder = tmp_path / "fashion-mnist"
    write_idx(folder)
    labels = made_up("test")[1]
    labels[3] = 200
    file = folder / fashion_mnist.FILES["test"][1]
    file.write_bytes(idx(labels))
    examples = FASHION.load(tmp_path, "test")

    with pytest.raises(ValueError, match="has the label 200, where 0 to 9 was") as error:
        list(eval_batches(FASHION, examples, batch_size=5, image_size=28))

    message = one_line(error)
    assert message.startswith("example 3 of the split test (")
    assert str(file) in message


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"\xff\xff", lambda r: r[:-3]])
def test_record_that_is_none_is_named(name, damage, copy):
    shard = shard_of(copy, name)
    records = records_of(shard)
    records[6] = damage(records[6])
    write_records(shard, records)

    examples = LOADS[name](copy, "train")

    with pytest.raises(ValueError, match="cannot be read: ") as error:
        examples[6]
    assert f"example 6 of the split train of {name}/" in one_line(error)
    assert f"(record 6 of {shard}) cannot be read: " in one_line(error)
    assert examples[7]["label"] >= 0


def test_record_of_a_later_shard_is_named(tmp_path):
    splits = {"train": grey_examples(40), "test": grey_examples(4)}
    tfds.disable_progress_bar()
    Birds(
        {"image": GREY, "label": LABEL}, splits, data_dir=tmp_path, file_format="array_record"
    ).download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    shards = sorted((tmp_path / "birds").rglob("*-train.array_record*"))
    records = records_of(shards[2])
    records[3] = b""
    write_records(shards[2], records)
    index = sum(len(records_of(shard)) for shard in shards[:2]) + 3

    examples = dataset_of("birds", tmp_path).load(None, "train")

    assert len(shards) == 4
    with pytest.raises(ValueError, match="it has no image and no label") as error:
        examples[index]
    assert f"example {index} of the split train of birds/2.1.0 (record 3 of {shards[2]})" in str(
        error.value
    )


def test_flipped_bytes_spoil_one_record(copy):
    sound = [dict(example) for example in IMAGENET.load(copy, "test")]
    shard = shard_of(copy, "imagenet2012", "validation")
    content = bytearray(shard.read_bytes())
    position = len(sound[0]["image"])
    content[position : position + 8] = bytes(byte ^ 0xFF for byte in content[position:][:8])
    shard.write_bytes(content)

    examples = IMAGENET.load(copy, "test")
    with pytest.raises(ValueError, match=r"cannot be read: Corrupted Riegeli") as error:
        examples[0]
    assert f"example 0 of the split validation of imagenet2012/5.1.0 (record 0 of {shard})" in (
        one_line(error)
    )
    damaged, whole = (
        list(eval_batches(IMAGENET, split, **SIZES, max_bad_examples=number))
        for split, number in ((examples, 1), (sound, 0))
    )
    assert [batch["bad_examples"] for batch in damaged] == [1, 0]
    assert damaged[0]["mask"].tolist() == [0.0, *7 * [1.0]]
    assert not damaged[0]["image"][0].any()
    np.testing.assert_array_equal(damaged[0]["image"][1:], whole[0]["image"][1:])
    np.testing.assert_array_equal(damaged[1]["image"], whole[1]["image"])


def test_image_of_prepared_fashion_mnist_that_cannot_be_decoded_is_named(tmp_path):
    class Broken(FashionMnist, skip_registration=True):
        name = "fashion_mnist"

        def _generate_examples(self, split):
            for index, example in super()._generate_examples(split):
                yield index, {**example, "image": io.BytesIO(b"?")} if index == 4 else example

    Broken(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    examples = FASHION.load(tmp_path, "train")

    with pytest.raises(ValueError, match=r"fashion_mnist/3\.0\.1 \(record .*be decoded") as error:
        list(eval_batches(FASHION, examples, batch_size=5, image_size=28))
    batches = list(eval_batches(FASHION, examples, batch_size=5, image_size=28, max_bad_examples=1))

    one_line(error)
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.sum() == 19
    images = np.concatenate([batch["image"] for batch in batches])[mask == 1]
    expected = np.delete(made_up("train")[0], 4, axis=0)
    assert sorted(map(bytes, images)) == sorted(map(bytes, expected))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_header_is_a_value_error_or_goes_unnoticed(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    content = file_of(pixels, kind)
    size_of_frame = content.find(b"\xff\xc0") + 5
    outcomes = set()
    for position, value in itertools.product(range(200), (0, 255)):
        damaged = bytearray(content)
        # Not a height or width of 65,280 and more: that takes long.
        is_size = kind == "JPEG" and 0 <= position - size_of_frame < 4
        damaged[position] = 0 if is_size else value
        for view in (encoded.decode, view_of):
            try:
                outcomes.add(view(bytes(damaged), 3, "it").dtype)
            except ValueError as error:
                outcomes.add(str(error).partition(":")[0])

    assert outcomes == {np.dtype(np.uint8), "it cannot be decoded"}


def view_of(content, channels, name):
    return encoded.random_resized_crop(content, channels, name, 8, np.random.default_rng(0))


def test_image_without_pixels_is_named():
    content = bytearray(file_of(np.zeros((12, 12, 3), np.uint8), "JPEG"))
    size = content.find(b"\xff\xc0") + 5
    content[size : size + 4] = bytes(4)

    with pytest.raises(ValueError, match="it cannot be decoded"):
        view_of(bytes(content), 3, "it")


# Files and folders.


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda shard: shard.unlink(), FileNotFoundError, "is missing, where an ArrayRecord file"),
        (lambda shard: shard.write_bytes(b""), FileNotFoundError, "is empty, where an ArrayRecord"),
        (lambda shard: shard.write_bytes(b"<html>404</html>"), ValueError, "in which 0 examples"),
        (lambda shard: cut(shard, 1), ValueError, "in which 0 examples are found, "),
        (lambda shard: cut(shard, shard.stat().st_size - 65536), ValueError, "in which 0 examples"),
        (lambda shard: cut(shard, shard.stat().st_size // 2), ValueError, "in which 0 examples"),
        (
            lambda shard: write_records(shard, records_of(shard)[:-2]),
            ValueError,
            r"has \d+ bytes, in which \d+ examples are found, where \d+ were expected, as",
        ),
    ],
    ids=["missing", "empty", "a web page", "a byte less", "a block", "half", "two records less"],
)
def test_damaged_shard_is_found_when_the_split_is_opened(name, damage, kind, message, copy):
    shard = shard_of(copy, name)
    damage(shard)

    with pytest.raises(kind, match=message) as error:
        LOADS[name](copy, "train")

    assert one_line(error).startswith(str(shard))
    assert f"restore it, or remove {shard.parent} and write the data set again with" in str(
        error.value
    )


def cut(shard, number):
    shard.write_bytes(shard.read_bytes()[:-number])


def test_records_that_are_missing_are_counted(copy):
    shard = shard_of(copy, "imagenet2012")
    write_records(shard, records_of(shard)[:-2])

    with pytest.raises(ValueError, match="in which 30 examples are found, where 32 were expected"):
        IMAGENET.load(copy, "train")
    assert len(IMAGENET.load(copy, "test")) == 16


@pytest.mark.parametrize(("split", "name"), [("train", "train"), ("test", "validation")])
def test_empty_split_is_refused(split, name, copy):
    info = copy / "imagenet2012/5.1.0/dataset_info.json"
    content = json.loads(info.read_text())
    for of_split in content["splits"]:
        if of_split["name"] == name:
            of_split["shardLengths"] = ["0"]
    info.write_text(json.dumps(content))

    with pytest.raises(ValueError, match=f"the split {name} of imagenet2012.* no exam") as error:
        IMAGENET.load(copy, split)

    assert str(info.parent) in one_line(error)


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_files_of_fashion_mnist_are_refused(split, tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    image_file, label_file = (folder / file for file in fashion_mnist.FILES[split])
    image_file.write_bytes(idx(np.zeros((0, 28, 28))))
    label_file.write_bytes(idx(np.zeros(0)))

    with pytest.raises(ValueError, match=r"images-idx3-ubyte.gz holds no images") as error:
        FASHION.load(tmp_path, split)
    assert str(image_file) in one_line(error)


@pytest.mark.parametrize("load", [*LOADS.values(), FASHION.load])
def test_data_folder_that_is_a_file_is_refused(load, tmp_path):
    file = tmp_path / "file"
    file.write_text("")

    with pytest.raises(NotADirectoryError, match="which is a file, but must be a fo") as error:
        load(file, "train")

    assert f"the data folder is {file}" in one_line(error)
    assert "--data-dir" in str(error.value)


def test_data_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(OSError, match="the digits cannot be written to") as error:
        DIGITS.load(tmp_path / "file" / "data", "train")

    assert str(tmp_path / "file" / "data") in one_line(error)
    assert "--data-dir" in str(error.value)


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_description_is_named(name, file, copy):
    (path,) = (copy / name).rglob(file)
    path.write_text(path.read_text()[:20])
    if (name, file) == ("sklearn_digits", "features.json"):
        assert len(DIGITS.load(copy, "train")) == 1437  # Its features are known.
        return

    with pytest.raises(ValueError, match="is damaged") as error:
        LOADS[name](copy, "train")
    assert str(copy / name) in one_line(error)


def test_bad_images_of_a_prepared_data_set_wait_for_the_training(tmp_path):
    splits = {"train": grey_examples(20), "test": grey_examples(8, seed=1)}
    write(tmp_path / "sound", {"image": GREY, "label": LABEL}, splits)
    # What comes first of each split, where it is looked at.
    sound = dataset_of("birds", tmp_path / "sound")
    first = sound.load(None, "train")[0]["image"]
    number = [example["image"] for example in splits["train"]].index(first)
    splits["train"][number]["image"] = b"?"
    write(tmp_path / "data", {"image": GREY, "label": LABEL}, splits)
    shard = shard_of(tmp_path / "data", "birds", "test")
    write_records(shard, [b"", *records_of(shard)[1:]])

    dataset = dataset_of("birds", tmp_path / "data")

    pixels = np.delete(grey_pixels(20), number, axis=0).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(dataset.std, [pixels.std()], rtol=1e-12)
    options = {"batch_size": 4, "image_size": 12}
    for batches, split in (
        (train_batches(dataset, dataset.load(None, "train"), **options, seed=0), "train"),
        (eval_batches(dataset, dataset.load(None, "test"), **options), "test"),
    ):
        with pytest.raises(ValueError, match=f"example 0 of the split {split} of birds"):
            list(itertools.islice(batches, 5))


# Passing over bad examples.


class Numbered(Sequence):
    """Examples whose image and label are their number, some of them bad."""

    def __init__(self, number, bad=()):
        self.number = number
        self.bad = dict.fromkeys(bad, "unreadable") if not isinstance(bad, dict) else bad

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        kind = self.bad.get(index)
        name = f"no. {index}"
        if kind == "unreadable":
            raise ValueError(f"{name} cannot be read")
        labels = {"too small": -1, "too large": self.number}
        image = None if kind == "undecodable" else index
        return {"image": image, "label": labels.get(kind, index), "name": name}

    @property
    def dataset(self):
        return dataclasses.replace(
            DIGITS,
            num_classes=self.number,
            augment=picture,
            crop=lambda example, size: picture(example, size, np.random.default_rng(0)),
        )


def picture(example, size, rng):
    """The number in the corner, and noise everywhere else."""
    if example["image"] is None:
        raise ValueError(f"{example['name']} cannot be decoded")
    image = rng.integers(0, 256, (size, size, 1), dtype=np.uint8)
    image[0, 0] = example["image"]
    return image


def training(examples, **options):
    return train_batches(
        examples.dataset,
        examples,
        **{"batch_size": 10, "image_size": 3, "seed": 0, "max_bad_examples": 250, **options},
    )


def evaluation(examples, **options):
    return eval_batches(
        examples.dataset,
        examples,
        **{"batch_size": 10, "image_size": 3, "max_bad_examples": 250, **options},
    )


KINDS = ("unreadable", "undecodable", "too small", "too large")


@st.composite
def broken(draw):
    # Grain takes milliseconds to shuffle a few examples.
    number = draw(st.integers(60, 250))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 0.8]))
    is_bad = rng.random(number) < share
    is_bad[rng.integers(number)] = False
    return Numbered(number, {i: str(rng.choice(KINDS)) for i in np.flatnonzero(is_bad).tolist()})


@settings(deadline=None, max_examples=25)
@given(
    examples=broken(),
    share=st.integers(1, 8),
    process_count=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**32 - 1),
    first_batch=st.integers(0, 12),
    num_cores=st.sampled_from([1, 2, 5]),
    chunk=st.sampled_from([1, 3, 16]),
)
def test_batches_are_full_and_the_same_however_they_are_made(
    examples, share, process_count, seed, first_batch, num_cores, chunk
):
    options = {"batch_size": 4 * share, "seed": seed}
    numbers = range(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_num_cores", lambda: num_cores)
        patch.setattr(pipeline, "CHUNK", chunk)
        parts = [
            training(
                examples,
                **options,
                first_batch=first_batch,
                process_index=index,
                process_count=process_count,
            )
            for index in range(process_count)
        ]
        together = [join([next(part) for part in parts]) for _ in numbers]

    single = training(examples, **options)
    earlier = list(itertools.islice(single, first_batch))
    whole = training(Numbered(len(examples)), **options, first_batch=first_batch)
    assert len(earlier) == first_batch
    for batch, of_one, without in zip(together, single, whole, strict=False):
        assert_same(batch, of_one)
        labels = batch["label"].tolist()
        assert not set(labels) & set(examples.bad)
        assert batch["image"][:, 0, 0, 0].tolist() == labels
        # The rest is what it is where nothing is bad.
        is_bad = np.isin(without["label"], list(examples.bad))
        assert batch["bad_examples"] == is_bad.sum()
        assert batch["bad_examples"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][~is_bad], without["image"][~is_bad])
        # What takes a place is no view of the batch twice.
        assert len(np.unique(batch["image"][:, 1:], axis=0)) == len(labels)


@settings(deadline=None, max_examples=25)
@given(examples=broken(), share=st.integers(1, 5), process_count=st.sampled_from([1, 2, 4]))
def test_bad_examples_are_not_evaluated(examples, share, process_count):
    options = {"batch_size": 4 * share, "process_count": process_count}
    parts = [evaluation(examples, **options, process_index=index) for index in range(process_count)]

    batches = [join(part) for part in zip(*parts, strict=True)]

    single = list(evaluation(examples, batch_size=4 * share))
    assert len(batches) == len(single)
    for batch, of_one in zip(batches, single, strict=True):
        assert_same(batch, of_one)
    whole = {
        name: np.concatenate([np.atleast_1d(batch[name]) for batch in batches])
        for name in batches[0]
    }
    good = [index for index in range(len(examples)) if index not in examples.bad]
    assert np.flatnonzero(whole["mask"]).tolist() == good
    assert whole["label"][good].tolist() == good
    assert whole["image"][good, 0, 0, 0].tolist() == good
    assert not whole["image"][whole["mask"] == 0].any()
    expected = [
        sum(index // (4 * share) == number for index in examples.bad)
        for number in range(len(batches))
    ]
    assert whole["bad_examples"].tolist() == expected


def test_iterator_goes_on_from_its_state():
    examples = Numbered(20, bad=[3, 7, 11])
    batches = training(examples)
    list(itertools.islice(batches, 3))
    state = batches.get_state()
    expected = [next(batches) for _ in range(3)]

    other = training(examples)
    other.set_state(state)

    assert sum(batch["bad_examples"] for batch in expected) > 0
    for batch in expected:
        assert_same(next(other), batch)


def test_another_example_takes_the_place_in_every_pass():
    batches = training(Numbered(10, bad=[4]))

    labels = [next(batches)["label"].tolist() for _ in range(30)]

    # Nine are there once, and one of them once more.
    twice = [next(label for label in row if row.count(label) == 2) for row in labels]
    assert all(len(set(row)) == 9 for row in labels)
    assert len(set(twice)) > 4


def test_same_bad_example_counts_once():
    batches = training(Numbered(10, bad=[4]), max_bad_examples=1)

    assert [next(batches)["bad_examples"] for _ in range(30)] == [1] * 30


@pytest.mark.parametrize("process_count", [1, 2])
def test_one_bad_example_too_many_in_training_ends_it_where_it_is_due(process_count):
    # Of 250 examples hardly another bad one takes the place of a bad one.
    bad = [17, 100, 211, 212]
    options = {"process_count": process_count, "process_index": process_count - 1}
    whole = training(Numbered(250), **options)
    met = []
    number = -1
    while len(met) < 3:
        number += 1
        labels = next(whole)["label"].tolist()
        met += [label for label in labels if label in bad and label not in met]
    batches = training(Numbered(250, bad), **options, max_bad_examples=2)

    delivered = list(itertools.islice(batches, number))
    with pytest.raises(ValueError, match=f"no. {met[2]} cannot be read") as error:
        next(batches)

    assert number > 0
    assert len(delivered) == number
    assert one_line(error).startswith(f"no. {met[2]} cannot be read")
    assert "Of the 250 examples of the split, 3 that this process has met are bad" in str(
        error.value
    )
    assert "--max-bad-examples is 2" in str(error.value)


def test_one_bad_example_too_many_in_evaluation_ends_it_where_it_is_due():
    examples = Numbered(100, bad=[3, 35, 58, 59])
    batches = evaluation(examples, max_bad_examples=2)

    delivered = list(itertools.islice(batches, 5))
    with pytest.raises(ValueError, match=r"no\. 58 cannot be read") as error:
        next(batches)

    assert [batch["bad_examples"] for batch in delivered] == [1, 0, 0, 1, 0]
    assert "Of the 100 examples of the split, 3 that" in one_line(error)
    assert len(list(evaluation(examples, max_bad_examples=4))) == 10


def test_split_of_bad_examples_alone_is_refused():
    examples = Numbered(4, bad=range(4))

    for batches in (training(examples), evaluation(examples)):
        with pytest.raises(ValueError, match="Of the 4 examples of the split, 4 that") as error:
            next(batches)
        one_line(error)


def test_nothing_else_than_bad_examples_is_passed_over():
    def fail(example, size, rng):
        raise TypeError("a mistake of ours")

    examples = Numbered(10)
    dataset = dataclasses.replace(examples.dataset, augment=fail)

    with pytest.raises(TypeError, match="a mistake of ours"):
        next(
            train_batches(dataset, examples, batch_size=2, image_size=3, seed=0, max_bad_examples=9)
        )


def test_photos_and_labels_that_are_bad_are_passed_over(sound, tmp_path):
    changes = {
        ("train", 5): {"image": io.BytesIO(NO_PHOTO)},
        ("train", 20): {"label": 1000},
        ("test", 2): {"label": -1},
        ("test", 11): {"image": io.BytesIO(b"")},
    }
    write_imagenet(tmp_path, sound, changes)
    train, test = (IMAGENET.load(tmp_path, split) for split in ("train", "test"))
    options = {**SIZES, "max_bad_examples": 2}

    batches = train_batches(IMAGENET, train, **options, seed=0)
    whole = train_batches(IMAGENET, IMAGENET.load(sound, "train"), **SIZES, seed=0)

    num_others = 0
    for batch, without in itertools.islice(zip(batches, whole, strict=True), 8):
        is_other = (batch["image"] != without["image"]).any(axis=(1, 2, 3))
        assert batch["bad_examples"] == is_other.sum()
        assert set(batch["label"].tolist()) <= set(tiny_imagenet.LABELS)
        assert batch["image"].any(axis=(1, 2, 3)).all()
        num_others += is_other.sum()
    assert num_others == 4  # Both in both passes.

    evaluated = list(eval_batches(IMAGENET, test, **options))
    mask = np.concatenate([batch["mask"] for batch in evaluated])
    assert np.flatnonzero(mask == 0).tolist() == [2, 11]
    assert [batch["bad_examples"] for batch in evaluated] == [1, 1]
