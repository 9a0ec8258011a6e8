"""The images of the study, and what is done to them on the device."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.convergence.study import Study
from train.data import fashion_mnist, images


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        images: uint8 [N, size, size, 1].
        labels: int32 [N].
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A part of Fashion-MNIST.

    Attributes:
        train: images to train on.
        valid: images by which learning rates are chosen.
        test: images that nothing is chosen by.
    """

    train: Split
    valid: Split
    test: Split


def load(study: Study, data_dir: Path | None) -> Problem:
    """Reads the images and draws those that the study needs, the same every time.

    Args:
        study: says how many images, and of which size.
        data_dir: the folder of `tensorflow-datasets`; None for its default.

    Raises:
        FileNotFoundError: if Fashion-MNIST is not there.
        ValueError: if there are too few images.
    """
    examples = fashion_mnist.load(data_dir, "train")
    needed = study.num_train + study.num_valid
    if needed > len(examples):
        raise ValueError(
            f"The study needs {needed:,} images to train and to validate on, but Fashion-MNIST's "
            f"files hold {len(examples):,} where 60,000 were expected: download them again."
        )
    order = np.random.default_rng(0).permutation(len(examples))[:needed]
    test = fashion_mnist.load(data_dir, "test")
    return Problem(
        _split(examples, order[: study.num_train], study.image_size),
        _split(examples, order[study.num_train :], study.image_size),
        _split(test, np.arange(len(test)), study.image_size),
    )


def _split(examples: fashion_mnist.Arrays, indices: np.ndarray, size: int) -> Split:
    shrunk = np.stack([images.resize(examples.images[index], size, size) for index in indices])
    return Split(shrunk, examples.labels[indices].astype(np.int32))


def augment(pixels: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image by up to an eighth of its height, and mirrors half of them.

    `train.data` does the same to single images on the host; here a whole batch is on the device.

    Args:
        pixels: uint8 [N, size, size, 1].
        key: the same key changes them in the same way.
    """
    margin = -(-pixels.shape[1] // 8)
    padded = jnp.pad(pixels, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    corner_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (len(pixels), 2), 0, 2 * margin + 1)
    flips = jax.random.bernoulli(flip_key, shape=(len(pixels), 1, 1, 1))

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), pixels.shape[1:])

    moved = jax.vmap(cut)(padded, corners)
    return jnp.where(flips, moved[:, :, ::-1], moved)
