"""`python -m train.prepare`: what it refuses, and what the real builders write."""

import collections
import importlib.util
import io
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from tests.train import tiny_imagenet
from tests.train.commands import kill_when
from train.data import imagenet
from train.prepare import TARS, Arguments, prepare

VERSION = "5.1.0"


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    tiny_imagenet.write_tars(folder, num_train=24, num_validation=16)
    return folder


@pytest.fixture(scope="module")
def long_tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long_tars")
    tiny_imagenet.write_long_tars(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tars, tmp_path_factory):
    """What the command of train/README.md prints, and its data folder."""
    folder = tmp_path_factory.mktemp("prepared")
    return tiny_imagenet.prepare(tars, folder), folder


def refusal(name, data_dir, manual_dir=None):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        prepare(Arguments(name=name, data_dir=data_dir, manual_dir=manual_dir))
    assert not data_dir.exists() or not list(data_dir.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def start(*options, python=sys.executable):
    return subprocess.Popen(
        [python, "-m", "train.prepare", *map(str, options)],
        cwd=tiny_imagenet.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_nothing_of_the_training_is_imported():
    program = (
        "import sys, train.prepare\n"
        "found = {'jax', 'flax', 'grain', 'sklearn', 'tensorflow'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tiny_imagenet.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_refusal_is_one_line(tmp_path):
    process = start("imagenet", "--data-dir", tmp_path)
    output, errors = process.communicate(timeout=60)

    assert (process.returncode, output) == (2, "")
    assert errors.startswith("python -m train.prepare: --manual-dir is not given")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("name", ["imagenet", "imagenet2012", f"imagenet2012:{VERSION}"])
def test_imagenet_needs_a_folder_with_both_tars(name, tmp_path):
    folder = tmp_path / "tars"
    message = refusal(name, tmp_path / "data")
    assert "--manual-dir is not given" in message
    assert "https://image-net.org" in message
    assert f"{folder}, which is no folder" in refusal(name, tmp_path / "data", folder)

    folder.mkdir()
    message = refusal(name, tmp_path / "data", folder)
    assert f"holds nothing, but not {' and '.join(TARS)}" in message
    (folder / "ILSVRC2012_img_val.tar").touch()
    message = refusal(name, tmp_path / "data", folder)
    assert "holds ILSVRC2012_img_val.tar, but not ILSVRC2012_img_train.tar:" in message


def test_without_tensorflow_the_command_that_installs_it_is_named(tars, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    message = refusal("imagenet", tmp_path / "data", tars)
    assert "pip install -e '.[imagenet]'" in message
    assert "TensorFlow is not installed" in refusal("cifar10", tmp_path / "data")


def test_full_disk_is_found_first(tars, tmp_path, monkeypatch):
    size = sum((tars / name).stat().st_size for name in TARS)
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(size - 1))

    with pytest.raises(ValueError, match=f"{size - 1:,} bytes of free space, .* the {size:,} of"):
        prepare(Arguments(name="imagenet", manual_dir=tars, data_dir=tmp_path))
    assert not list((tmp_path / "imagenet2012").iterdir())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar1", "'cifar1', which tensorflow-datasets does not have. Close to it: cifar10, "),
        ("imagenet1", "Close to it: imagenet, "),
        ("xyzzy", "does not have. All are listed at https://"),
        ("cifar10:9.9.9", "only: 3.0.2"),
        ("imagenette/320px-v9", "BuilderConfig 320px-v9 not found"),
        ("two words", "NAME, NAME/CONFIGURATION or either of them with :VERSION was expected"),
    ],
)
def test_unknown_name(name, expected, tmp_path):
    assert expected in refusal(name, tmp_path / "data")


def test_digits_need_no_preparing(tmp_path, capsys):
    prepare(Arguments(name="digits", data_dir=tmp_path))

    assert "need no preparing" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_prepared_stays_as_it_is(tmp_path, capsys):
    tiny_imagenet.write(tmp_path, num_train=16, num_validation=8)
    before = contents(tmp_path)

    prepare(Arguments(name="imagenet", data_dir=tmp_path))

    output = capsys.readouterr().out
    assert "prepared before" in output
    assert f"{tmp_path}/imagenet2012/{VERSION}, with these examples: 16 train, 8 val" in output
    assert f"Next: python -m train imagenet-resnet50 --data-dir {tmp_path}\n" in output
    assert contents(tmp_path) == before


def test_another_format_in_the_same_place_is_refused(tmp_path):
    tiny_imagenet.write(tmp_path, num_train=16, num_validation=8)
    info = tmp_path / "imagenet2012" / VERSION / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))

    with pytest.raises(ValueError, match=r"as tfrecord, where array_record .* --data-dir"):
        prepare(Arguments(name="imagenet", data_dir=tmp_path))


def test_a_folder_that_holds_no_data_set_is_refused(tmp_path):
    (tmp_path / "imagenet2012" / VERSION).mkdir(parents=True)

    with pytest.raises(ValueError, match=r"without dataset_info\.json.*remove it, or"):
        prepare(Arguments(name="imagenet", data_dir=tmp_path))


@pytest.mark.tensorflow
def test_command_says_what_it_wrote(prepared, tars):
    output, folder = prepared

    assert f"{folder}/imagenet2012/{VERSION}, with these examples: 24 train, 16 val" in output
    assert output.endswith(f"\nNext: python -m train imagenet-resnet50 --data-dir {folder}\n")
    size = (tars / "ILSVRC2012_img_val.tar").stat().st_size
    assert f"img_val.tar has {size:,} bytes, and ImageNet's 6,744,924,160" in output


@pytest.mark.tensorflow
def test_photos_and_labels_are_those_of_the_tars(prepared):
    train, test = (imagenet.load(prepared[1], split) for split in ("train", "test"))
    by_name = {example["file_name"].decode(): example for example in [*train, *test]}

    counts = collections.Counter(example["label"] for example in train)
    assert counts == dict.fromkeys(tiny_imagenet.LABELS, 3)
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 17)]
    assert [by_name[name]["label"] for name in names] == tiny_imagenet.validation_labels(16)
    assert len(by_name) == 24 + 16
    assert by_name.keys() > {tiny_imagenet.CMYK_PHOTO, tiny_imagenet.PNG_PHOTO}
    for example in by_name.values():
        # Among them are one that was a PNG and one that had four colours, both by name.
        photo = PIL.Image.open(io.BytesIO(example["image"]))
        assert (photo.format, photo.mode) == ("JPEG", "RGB")
        high = imagenet.crop(example, 64).mean(axis=(0, 1)) > 127
        assert np.packbits(high, bitorder="little")[0] == example["label"] % 8


def unfinished(folder):
    return {path.name for path in (folder / "imagenet2012").glob("incomplete.*")}


@pytest.mark.tensorflow
def test_what_a_killed_run_left_is_removed_but_not_what_another_writes(tars, long_tars, tmp_path):
    foreign = f"incomplete.FOREIG_{VERSION}"
    (tmp_path / "imagenet2012" / foreign).mkdir(parents=True)

    def run(tars):
        options = ("--manual-dir", tars, "--data-dir", tmp_path)
        return start("imagenet", *options, python=tiny_imagenet.tensorflow_python())

    def second_run_is_refused():
        left = unfinished(tmp_path) - {foreign}
        if not left:
            return False
        killed.send_signal(signal.SIGSTOP)
        second = run(tars)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"another process is preparing imagenet2012/{VERSION}" in errors
        assert unfinished(tmp_path) == {foreign, *left}
        return True

    killed = run(long_tars)
    kill_when(second_run_is_refused, killed)
    (left,) = unfinished(tmp_path) - {foreign}
    third = run(tars)
    output, errors = third.communicate(timeout=60)

    assert third.returncode == 0, errors
    folder = tmp_path / "imagenet2012"
    assert f"Removing {folder / left}, which" in output
    assert f"Mind {folder / foreign}: if no other process" in output
    assert {path.name for path in folder.iterdir()} == {VERSION, foreign}


@pytest.mark.tensorflow
def test_after_an_interrupt_nothing_is_left(long_tars, tmp_path):
    process = start(
        *("imagenet", "--manual-dir", long_tars, "--data-dir", tmp_path),
        python=tiny_imagenet.tensorflow_python(),
    )
    while not unfinished(tmp_path):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 130
    assert errors.endswith(
        "python -m train.prepare: interrupted: what was unfinished is removed.\n"
    )
    assert "Traceback" not in errors
    assert not list((tmp_path / "imagenet2012").iterdir())


@pytest.mark.tensorflow
def test_any_other_set_by_name(tmp_path):
    manual_dir = tmp_path / "manual"
    classes = ["airplane", "wetland"]
    for name in classes:
        folder = manual_dir / "NWPU-RESISC45" / name
        folder.mkdir(parents=True)
        PIL.Image.new("RGB", (256, 256)).save(folder / f"{name}_001.jpg")
    process = start(
        *("resisc45", "--manual-dir", manual_dir, "--data-dir", tmp_path),
        python=tiny_imagenet.tensorflow_python(),
    )
    output, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert output.endswith(f"\nNext: python -m train --dataset resisc45 --data-dir {tmp_path}\n")
    builder = tfds.builder("resisc45", data_dir=tmp_path, file_format="array_record")
    labels = [example["label"] for example in builder.as_data_source("train")]
    assert sorted(map(builder.info.features["label"].int2str, labels)) == classes


@pytest.mark.tensorflow
def test_broken_tar_is_one_line(tars, tmp_path):
    for name in TARS:
        (tmp_path / name).write_bytes((tars / name).read_bytes()[:20_000])
    process = start(
        *("imagenet", "--manual-dir", tmp_path, "--data-dir", tmp_path / "data"),
        python=tiny_imagenet.tensorflow_python(),
    )
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith(
        "python -m train.prepare: tensorflow-datasets could not prepare "
        f"imagenet2012/{VERSION}. It says: "
    )
    assert "Traceback" not in errors
    assert not list((tmp_path / "data" / "imagenet2012").iterdir())
