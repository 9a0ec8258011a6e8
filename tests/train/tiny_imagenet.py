"""A tiny ImageNet: prepared as the real builder reads it, or as the tar files that it prepares."""

import io
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from benchmarks import photos

ROOT = Path(__file__).parent.parent.parent
# The Python of an environment that has TensorFlow, beside the one that runs the tests.
TENSORFLOW = Path(sys.prefix) / "tensorflow" / "bin" / "python"

# Eight labels from all over the thousand. Each has its own corner of the colour cube, as the lowest
# three bits of a label say.
LABELS = (0, 281, 466, 59, 604, 885, 230, 999)
# Of the photos that the real ImageNet stores in another way, two with labels from above.
CMYK_PHOTO = "n01739381_1309.JPEG"
PNG_PHOTO = "n02105855_2933.JPEG"


def write(data_dir, num_train=64, num_validation=24):
    """Writes splits "train" and "validation" as ArrayRecord files below data_dir/imagenet2012.

    The photos are 80 to 120 pixels high and wide, patterns in the colour of their label, which
    takes the values of LABELS in turn.
    """
    photos.write_imagenet(
        data_dir,
        {
            "train": _examples("train", num_train),
            "validation": _examples("validation", num_validation),
        },
    )


def _examples(split, number):
    rng = np.random.default_rng(split == "train")
    synsets = _lines("labels.txt")
    for index in range(number):
        label = LABELS[index % len(LABELS)]
        name = f"{synsets[label]}_{index}.JPEG"
        if split == "validation":
            name = f"ILSVRC2012_val_{index + 1:08d}.JPEG"
        yield {"image": _file(_pixels(label, rng)), "label": label, "file_name": name}


def write_tars(folder, num_train=64, num_validation=24):
    """Writes the tar files that ImageNet is handed out as.

    The labels of the training photos take the values of LABELS in turn; those of the others are
    what `validation_labels` returns.
    """
    rng = np.random.default_rng(0)
    synsets = _lines("labels.txt")
    names = {59: CMYK_PHOTO, 230: PNG_PHOTO}
    of_labels = {label: {} for label in LABELS}
    for index in range(num_train):
        label = LABELS[index % len(LABELS)]
        name = names.pop(label, f"{synsets[label]}_{index}.JPEG")
        of_labels[label][name] = _photo(name, _pixels(label, rng))
    train = {f"{synsets[label]}.tar": _tar(of_label) for label, of_label in of_labels.items()}
    validation = {
        f"ILSVRC2012_val_{number:08d}.JPEG": _file(_pixels(label, rng))
        for number, label in enumerate(validation_labels(num_validation), start=1)
    }
    for split, files in {"train": train, "val": validation}.items():
        (folder / f"ILSVRC2012_img_{split}.tar").write_bytes(_tar(files).getvalue())


def write_long_tars(folder):
    """Writes tar files that take long: one photo so often that only the end of them is wrong."""
    label, synset = LABELS[0], _lines("labels.txt")[LABELS[0]]
    photo = _file(_pixels(label, np.random.default_rng(0))).getvalue()
    member = tarfile.TarInfo(f"{synset}_0.JPEG")
    member.size = len(photo)
    padding = bytes(-len(photo) % tarfile.BLOCKSIZE)
    photos = io.BytesIO((member.tobuf() + photo + padding) * 20_000)
    for split, files in {"train": {f"{synset}.tar": photos}, "val": {}}.items():
        (folder / f"ILSVRC2012_img_{split}.tar").write_bytes(_tar(files).getvalue())


def prepare(tars, data_dir):
    """Has the tar files prepared as train/README.md says, and returns what was printed."""
    readme = (ROOT / "train" / "README.md").read_text()
    (command,) = re.findall(r"^python -m train.prepare imagenet .*$", readme, re.MULTILINE)
    paths = {"FOLDER": str(tars), "DIR": str(data_dir)}
    _, *arguments = [paths.get(word, word) for word in shlex.split(command)]
    assert set(paths.values()) < set(arguments)
    return subprocess.run(
        [tensorflow_python(), *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def tensorflow_python():
    """The Python that has TensorFlow, without which the test fails."""
    if not TENSORFLOW.exists():
        folder = TENSORFLOW.parent.parent
        pytest.fail(
            f"{TENSORFLOW} is not there: python3 -m venv {folder} && {folder}/bin/pip install -q "
            "-e '.[imagenet]'",
            pytrace=False,
        )
    return TENSORFLOW


def validation_labels(number):
    """The labels of the first so many photos of the validation split, as they were published."""
    synsets = _lines("labels.txt")
    return [synsets.index(synset) for synset in _lines("validation_labels.txt")[:number]]


def _lines(name):
    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()


def _photo(name, pixels):
    if name == CMYK_PHOTO:
        return _file(pixels, mode="CMYK")
    return _file(pixels, "PNG" if name == PNG_PHOTO else "JPEG")


def _tar(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, file in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(file.getvalue())
            tar.addfile(member, file)
    content.seek(0)
    return content


def _pixels(label, rng):
    height, width = rng.integers(80, 120, size=2, endpoint=True).tolist()
    corner = [(label >> bit) & 1 for bit in range(3)]
    # Coarse noise made large looks and compresses more like a photo than noise of single pixels.
    pattern = rng.integers(15, 65, size=(8, 8, 3), dtype=np.uint8)
    pixels = np.asarray(
        PIL.Image.fromarray(pattern).resize((width, height), PIL.Image.Resampling.BICUBIC)
    )
    return pixels + np.uint8(170) * np.array(corner, np.uint8)


def _file(pixels, format="JPEG", mode="RGB"):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(file, format, quality=90)
    file.seek(0)
    return file
