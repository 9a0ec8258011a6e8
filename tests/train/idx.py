"""Fashion-MNIST's files, made up."""

import gzip

import numpy as np
import sklearn.datasets

from train.data import fashion_mnist


def idx(array):
    """An array in the format of the files."""
    header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes(), compresslevel=1)


def write(folder, splits):
    """Writes the files of `splits`: images and labels by the split's name."""
    folder.mkdir(parents=True)
    for split, arrays in splits.items():
        for name, array in zip(fashion_mnist.FILES[split], arrays, strict=True):
            (folder / name).write_bytes(idx(array))


def enlarged_digits(number):
    """Images of 28x28 pixels that can be learned, and their labels."""
    digits = sklearn.datasets.load_digits()
    order = np.arange(number) % len(digits.target)
    large = np.kron(digits.images[order], np.full((3, 3), 15))
    return np.pad(large, ((0, 0), (2, 2), (2, 2))), digits.target[order]
