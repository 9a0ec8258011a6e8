"""An ImageNet to measure with: views of scikit-learn's two photos, stored as the real one is."""

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import sklearn.datasets
import tensorflow_datasets as tfds

from train.data.dataset import Example

# What most of ImageNet's photos have, a quarter of them upright.
SIDES = (375, 500)
# With this the files take what ImageNet's take in the mean, 110 kB.
QUALITY = 98


def write(data_dir: Path, num_photos: int) -> None:
    """Writes splits "train" and "validation", as ArrayRecord files below data_dir/imagenet2012.

    Args:
        data_dir: the data folder.
        num_photos: of each split.
    """
    write_imagenet(
        data_dir, {split: _examples(split, num_photos) for split in ("train", "validation")}
    )


def write_imagenet(data_dir: Path, splits: Mapping[str, Iterable[Example]]) -> None:
    """Writes what the real builder writes, without TensorFlow, of photos that are made up.

    Args:
        data_dir: the data folder.
        splits: by its name, the examples of each, with "image", a file, "label" and "file_name".
    """
    tfds.disable_progress_bar()
    Imagenet2012(data_dir, splits).download_and_prepare()


# Registered, it would take the place of the real one.
class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Takes the examples as they are."""

    VERSION = tfds.core.Version("5.1.0")

    def __init__(self, data_dir: Path, splits: Mapping[str, Iterable[Example]]) -> None:
        self._splits = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        labels = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names_file=labels),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://image-net.org/",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, Example]]]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, Example]]:
        for example in self._splits[split]:
            yield example["file_name"], example


def _examples(split: str, num_photos: int) -> Iterator[Example]:
    rng = np.random.default_rng(split == "train")
    originals = sklearn.datasets.load_sample_images().images
    for index in range(num_photos):
        file = io.BytesIO(_encode(_view(originals[index % len(originals)], rng)))
        yield {"image": file, "label": index % 1000, "file_name": f"{split}_{index}.JPEG"}


def _view(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cuts out a random part of the usual shape and brings it to the usual size."""
    height, width = SIDES
    scale = rng.uniform(0.8, 1.0) * photo.shape[0] / height
    rows, columns = int(scale * height), int(scale * width)
    top = rng.integers(photo.shape[0] - rows, endpoint=True)
    left = rng.integers(photo.shape[1] - columns, endpoint=True)
    view = cv2.resize(photo[top : top + rows, left : left + columns], (width, height))
    return np.rot90(view) if rng.random() < 0.25 else view


def _encode(photo: np.ndarray) -> bytes:
    blue_first = np.ascontiguousarray(photo[..., ::-1])
    return cv2.imencode(".jpg", blue_first, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
