"""What a run needs before its first step: options that fit, open data, a network, a run folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

import clars_optax
from train.build import image_shape_of, network_of
from train.config import Config
from train.data import Dataset, dataset_of
from train.data.dataset import Example
from train.processes import refusing_together
from train.run_folder import open_run_folder
from train.validation import validate, validate_with_data


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run needs besides the options: open data and a run folder.

    Attributes:
        config: the options.
        dataset: the data set.
        train_examples: its training split.
        test_examples: its held-out split.
        network: the network.
        layers: names of its weights, from the first to the last.
        workdir: the run folder.
    """

    config: Config
    dataset: Dataset
    train_examples: Sequence[Example]
    test_examples: Sequence[Example]
    network: nn.Module
    layers: Sequence[str]
    workdir: Path

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.config.num_steps(len(self.train_examples))


def prepare(config: Config) -> Prepared:
    """Checks the options, opens the data and opens the run folder.

    Raises:
        ValueError: options do not fit together, or not with the data or with what the run folder
            holds; then nothing has been written to it.
        FileNotFoundError: the data are not there.
    """
    with refusing_together():
        dataset = dataset_of(config.dataset, config.data_dir, config.augmentation)
        validate(config, dataset, jax.device_count(), jax.process_count())
        train_examples = dataset.load(config.data_dir, "train")
        test_examples = dataset.load(config.data_dir, "test")
        validate_with_data(config, len(train_examples))
    network = network_of(config, dataset, jax.device_count())
    layers = _weights_by_depth(network, image_shape_of(config, dataset))
    workdir = open_run_folder(config, dataset, len(train_examples), jax.devices())
    return Prepared(config, dataset, train_examples, test_examples, network, layers, workdir)


def _weights_by_depth(network: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Names the weights in the order in which the network makes them, which is that of depth."""
    by_depth: list[str] = []

    def init(key: jax.Array) -> None:
        # What leaves a transformation of JAX is sorted by name.
        images = jnp.zeros((1, *image_shape))
        params = network.init(key, images, train=False)["params"]
        is_weight = traverse_util.flatten_dict(clars_optax.default_mask(params), sep="/")
        by_depth.extend(
            path for path in traverse_util.flatten_dict(params, sep="/") if is_weight[path]
        )

    jax.eval_shape(init, jax.random.key(0))
    return by_depth
