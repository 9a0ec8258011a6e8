"""CLARS with its parts in another order, to see which of them matter."""

import dataclasses
from typing import Any

import optax

import clars_optax
from train.optimizers import Optimizer, make_optimizer


def ratio_inside_momentum(
    schedule: optax.Schedule, *, momentum: float, weight_decay: float, **options: Any
) -> Optimizer:
    """Makes CLARS with each step's ratio in the momentum buffer, as LARS's authors have it."""
    return _with_chain(
        optax.add_decayed_weights(weight_decay, clars_optax.default_mask),
        _scale(),
        optax.trace(momentum),
        optax.scale_by_learning_rate(schedule),
        schedule=schedule,
        momentum=momentum,
        weight_decay=weight_decay,
        **options,
    )


def decay_outside(
    schedule: optax.Schedule, *, momentum: float, weight_decay: float, **options: Any
) -> Optimizer:
    """Makes CLARS whose decay is neither in the momentum buffer nor scaled by the ratio."""
    return _with_chain(
        optax.trace(momentum),
        _scale(),
        optax.add_decayed_weights(weight_decay, clars_optax.default_mask),
        optax.scale_by_learning_rate(schedule),
        schedule=schedule,
        momentum=momentum,
        weight_decay=weight_decay,
        **options,
    )


def _scale() -> optax.GradientTransformationExtraArgs:
    return optax.masked(
        clars_optax.scale_by_clars(),
        clars_optax.default_mask,
        mask_compatible_extra_args=True,
    )


def _with_chain(
    *parts: optax.GradientTransformation, schedule: optax.Schedule, **options: Any
) -> Optimizer:
    optimizer = make_optimizer("clars", schedule, **options)
    return dataclasses.replace(optimizer, transformation=optax.chain(*parts))
