"""The data sets by name, and how their batches are fed."""

import dataclasses
import difflib
import shlex
from pathlib import Path
from typing import Literal

from train.data import by_name, digits, fashion_mnist, imagenet, prepared
from train.data.augmentation import AugmentationName, make_augment
from train.data.dataset import Dataset

DATASETS: dict[str, Dataset] = {
    "digits": digits.DATASET,
    "fashion-mnist": fashion_mnist.DATASET,
    "imagenet2012": imagenet.DATASET,
}

__all__ = ["DATASETS", "Dataset", "dataset_of"]


def dataset_of(
    name: str, data_dir: Path | None, augmentation: Literal["auto", AugmentationName] = "auto"
) -> Dataset:
    """Finds a data set: one of `DATASETS`, or else one that is prepared in the data folder.

    Args:
        name: its name, for a prepared one as `tensorflow-datasets` takes it.
        data_dir: the data folder; None for the default of `tensorflow-datasets`.
        augmentation: how its images to train on are changed; "auto": as suits it.

    Raises:
        ValueError: if that can be no name, or the data set is none to train on.
        FileNotFoundError: if it is not there, or only in another format than ArrayRecord.
    """
    dataset = DATASETS[name] if name in DATASETS else _prepared(name, data_dir)
    if augmentation == "auto":
        return dataset
    augment = make_augment(augmentation, dataset.crop, dataset.random_crop)
    return dataclasses.replace(dataset, augment=augment)


def _prepared(name: str, data_dir: Path | None) -> Dataset:
    if not prepared.is_name(name):
        raise ValueError(
            f"--dataset is {name!r}, but must be {', '.join(DATASETS)} or what tensorflow-datasets "
            "calls a prepared one, such as cifar10, imagenette/320px-v2 or cifar10:3.0.2"
            f"{_hint(name)}."
        )
    found = prepared.folders(name, data_dir)
    if not found:
        folder = prepared.folder(data_dir)
        raise FileNotFoundError(
            f"--dataset is {name}, which is neither {', '.join(DATASETS)} nor prepared in "
            f"{folder}{_hint(name)}: prepare it with `python -m train.prepare {name} --data-dir "
            f"{shlex.quote(str(folder))}`, or name the folder that holds it with --data-dir."
        )
    return by_name.make_dataset(prepared.open_folder(found[-1]))


def _hint(name: str) -> str:
    # "imagenet" is close to imagenet2012, "imagenette" is not.
    close = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.75)
    return f" (is {close[0]} meant?)" if close else ""
