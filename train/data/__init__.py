"""The data sets by name, and how their batches are fed."""

from train.data import digits
from train.data.dataset import Dataset

DATASETS: dict[str, Dataset] = {"digits": digits.DATASET}

__all__ = ["DATASETS", "Dataset"]
