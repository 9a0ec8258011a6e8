"""scikit-learn's handwritten digits as a data set of `tensorflow-datasets`, without TensorFlow.

1,797 images of 8x8 pixels with values 0 to 16, from the test part of Alpaydin and Kaynak's
"Optical Recognition of Handwritten Digits" (UCI, 1998). They come inside scikit-learn's package, so
nothing is downloaded.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from train.data import images, prepared, records
from train.data.augmentation import make_augment
from train.data.dataset import Dataset, Example

NUM_TEST = 360


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """Four fifths of scikit-learn's digits to train on, one fifth to test on."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's handwritten digits, split by class into train and test.",
            features=tfds.features.FeaturesDict(
                {
                    # tfds.features.Image would want TensorFlow to encode a PNG.
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Example]]]:
        del dl_manager
        # Here, because it takes two seconds, and only the first run of all writes the digits.
        import sklearn.datasets
        import sklearn.model_selection

        digits = sklearn.datasets.load_digits()
        train, test = sklearn.model_selection.train_test_split(
            np.arange(len(digits.target)),
            test_size=NUM_TEST,
            stratify=digits.target,
            random_state=0,
        )
        return {
            "train": self._generate_examples(digits, train),
            "test": self._generate_examples(digits, test),
        }

    def _generate_examples(self, digits: Any, indices: np.ndarray) -> Iterator[tuple[int, Example]]:
        for index in indices.tolist():
            image = digits.images[index].astype(np.uint8)[..., np.newaxis]
            yield index, {"image": image, "label": int(digits.target[index])}


def load(data_dir: Path | None, split: str) -> Sequence[Example]:
    """Reads a split, which is written first where it is not there yet.

    Args:
        data_dir: the folder of `tensorflow-datasets`; None for its default.
        split: "train" or "test".

    Returns:
        The examples, by index.

    Raises:
        OSError: if the split cannot be written, or not all of it is there.
        ValueError: if it is damaged.
    """
    folder = prepared.folder(data_dir)
    try:
        builder = _prepare(folder)
    except prepared.DAMAGED as error:
        raise prepared.damaged_description(folder / SklearnDigits.name, error) from error
    return records.open_split(builder, split, "`python -m train`", image="image", label="label")


def _prepare(folder: Path) -> tfds.core.DatasetBuilder:
    builder = SklearnDigits(data_dir=folder, file_format="array_record")
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare()
    except OSError as error:
        # Another process may have put its own, finished, copy in place meanwhile.
        builder = SklearnDigits(data_dir=folder, file_format="array_record")
        if not builder.is_prepared():
            raise OSError(
                f"the digits cannot be written to {folder} ({error}), but must be: name a folder "
                "that can be written to with --data-dir."
            ) from error
    return builder


def crop(example: Example, size: int) -> np.ndarray:
    """Returns the image, resized where another size is asked for."""
    return images.resize(example["image"], size, size)


def random_crop(example: Example, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random part of the image."""
    return images.random_resized_crop(example["image"], size, rng)


DATASET = Dataset(
    num_classes=10,
    image_size=8,
    channels=1,
    mean=(4.886,),
    std=(6.018,),
    load=load,
    # A digit that is flipped is another one, and 8 pixels leave no margin.
    augment=make_augment("none", crop, random_crop),
    crop=crop,
    random_crop=random_crop,
)
