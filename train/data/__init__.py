"""The data sets by name, and how their batches are fed."""

from train.data import digits, fashion_mnist, imagenet
from train.data.dataset import Dataset

DATASETS: dict[str, Dataset] = {
    "digits": digits.DATASET,
    "fashion-mnist": fashion_mnist.DATASET,
    "imagenet2012": imagenet.DATASET,
}

__all__ = ["DATASETS", "Dataset"]
