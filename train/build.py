"""The parts of a run, made from its options."""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from train.body import Accumulation, TrainBody
from train.config import Config
from train.data import Dataset
from train.models import make_model
from train.optimizers import Optimizer, make_optimizer
from train.schedules import make_schedule
from train.state import DrawState, draw_state
from train.step import AXIS, TrainStep


def image_shape_of(config: Config, dataset: Dataset) -> tuple[int, int, int]:
    """Returns height, width and channels of what the network sees."""
    return dataset.image_shape(config.image_size or dataset.image_size)


def network_of(config: Config, dataset: Dataset, num_devices: int) -> nn.Module:
    """Makes the network, with its groups of devices for BatchNorm.

    Raises:
        ValueError: an option has no place in this network.
    """
    group = config.bn_group or num_devices
    groups = None
    if 1 < group < num_devices:
        groups = [list(range(i, i + group)) for i in range(0, num_devices, group)]
    return make_model(
        config.model,
        num_classes=dataset.num_classes,
        norm_momentum=config.norm_momentum,
        axis_name=None if group == 1 else AXIS,
        axis_index_groups=groups,
        dtype=jnp.dtype(config.dtype),
        dropout_rate=config.dropout_rate,
        zero_init_residual=config.zero_init_residual,
    )


def schedule_of(config: Config, num_train: int) -> optax.Schedule:
    """Makes the learning rate over the steps.

    Raises:
        ValueError: the schedule does not fit the length of the run.
    """
    return make_schedule(
        config.schedule,
        peak=config.peak_learning_rate,
        end=config.end_learning_rate,
        warmup_steps=config.in_steps(config.warmup_epochs, num_train),
        num_steps=config.num_steps(num_train),
        boundaries=[config.in_steps(epoch, num_train) for epoch in config.decay_epochs],
    )


def optimizer_of(
    config: Config, learning_rate: optax.ScalarOrSchedule, num_steps: int
) -> Optimizer:
    """Makes the optimizer.

    Raises:
        ValueError: an option has no place in this optimizer.
    """
    return make_optimizer(
        config.optimizer,
        learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        weight_decay_mask=config.weight_decay_mask,
        trust_coefficient=config.trust_coefficient,
        max_trust_ratio=config.max_trust_ratio,
        batch_size=config.batch_size,
        group_size=config.group_size,
        num_steps=num_steps,
    )


def accumulation_of(config: Config, num_devices: int) -> Accumulation:
    """Says what one device does, of what the options say of all of them."""
    transfer_size = config.transfer_size or config.batch_size
    piece_size = transfer_size // num_devices
    microbatch_size = config.microbatch_size
    if microbatch_size is not None and microbatch_size >= piece_size:
        microbatch_size = None
    return Accumulation(
        pieces=config.batch_size // transfer_size,
        piece_size=piece_size,
        microbatch_size=microbatch_size,
        group_size=config.group_size,
        num_norm_examples=(config.num_norm_examples or config.batch_size) // num_devices,
    )


def training_of(
    config: Config,
    dataset: Dataset,
    network: nn.Module,
    num_train: int,
    devices: Sequence[jax.Device],
) -> tuple[DrawState, TrainStep]:
    """Makes what draws the initial state, and the training step.

    Args:
        config: the options.
        dataset: the data set.
        network: from `network_of`.
        num_train: examples of the training split.
        devices: those of all processes.
    """
    schedule = schedule_of(config, num_train)
    optimizer = optimizer_of(config, schedule, config.num_steps(num_train))
    accumulation = accumulation_of(config, len(devices))
    if not optimizer.needs_norms:
        accumulation = dataclasses.replace(accumulation, num_norm_examples=0)
    body = TrainBody(
        dataset,
        optimizer,
        schedule,
        accumulation,
        AXIS,
        label_smoothing=config.label_smoothing,
        seed=config.seed,
    )
    draw = functools.partial(
        draw_state,
        model=network,
        image_shape=image_shape_of(config, dataset),
        transformation=optimizer.transformation,
        ema_decay=config.ema_decay,
    )
    return draw, TrainStep(body, devices)
