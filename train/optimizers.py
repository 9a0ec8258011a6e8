"""The optimizers by name, so built that they differ in nothing but the rates of the layers.

All three add the decay to the gradient, keep a heavy-ball buffer, and multiply by the rate after
it. Biases and BatchNorm scales have neither decay nor a layer-wise rate.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import clars_optax

LARS_TRUST_COEFFICIENT = 0.001


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer and what is plotted of it.

    Attributes:
        transformation: the optimizer; its `update` takes `example_grad_norms`.
        needs_norms: whether it reads them.
        diagnose: takes parameters, gradients (averaged over the devices), norms (of the device) and
            the name of the devices' axis; returns trees like the parameters by the name of the
            quantity, "trust_ratio" always among them.
    """

    transformation: optax.GradientTransformationExtraArgs
    needs_norms: bool
    diagnose: Callable[[Any, Any, Any, str | None], dict[str, Any]]


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    weight_decay: float,
    batch_size: int,
    group_size: int,
) -> Optimizer:
    """Makes an optimizer by name.

    Args:
        name: "clars", "lars" or "sgd".
        learning_rate: a number or a schedule.
        momentum: decay rate of the momentum buffer.
        weight_decay: coefficient of the decay.
        batch_size: examples per step, over all devices.
        group_size: examples per norm.
    """
    if name == "clars":
        return _clars(learning_rate, momentum, weight_decay, batch_size, group_size)
    if name == "lars":
        return _lars(learning_rate, momentum, weight_decay, batch_size)
    if name == "sgd":
        return _sgd(learning_rate, momentum, weight_decay)
    raise ValueError(f"optimizer is {name!r}, but must be 'clars', 'lars' or 'sgd'.")


def _clars(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: float,
    batch_size: int,
    group_size: int,
) -> Optimizer:
    def diagnose(params: Any, grads: Any, norms: Any, axis_name: str | None) -> dict[str, Any]:
        quantities = clars_optax.diagnostics(
            params,
            grads,
            norms,
            batch_size=batch_size,
            group_size=group_size,
            axis_name=axis_name,
        )
        return {
            "trust_ratio": quantities.trust_ratio,
            "variance_factor": quantities.variance_factor,
        }

    transformation = clars_optax.clars(learning_rate, momentum, weight_decay=weight_decay)
    return Optimizer(transformation, needs_norms=True, diagnose=diagnose)


def _lars(
    learning_rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float, batch_size: int
) -> Optimizer:
    """CLARS with the norm of (gradient + decay) as the denominator, and no cap."""
    chain = clars_optax.clars(
        learning_rate,
        momentum,
        weight_decay=weight_decay,
        trust_coefficient=LARS_TRUST_COEFFICIENT,
        max_trust_ratio=math.inf,
    )

    def denominators(grads: Any, params: Any) -> Any:
        decay = optax.add_decayed_weights(weight_decay, clars_optax.default_mask)
        decayed, _ = decay.update(grads, decay.init(params), params)
        return jax.tree.map(lambda leaf: jnp.linalg.norm(jnp.ravel(leaf)), decayed)

    def update(
        grads: Any, state: optax.OptState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        del extra_args
        norms = denominators(grads, params)
        return chain.update(grads, state, params, example_grad_norms=norms)

    def diagnose(params: Any, grads: Any, norms: Any, axis_name: str | None) -> dict[str, Any]:
        del norms, axis_name
        norms_of_one_group = jax.tree.map(jnp.atleast_1d, denominators(grads, params))
        quantities = clars_optax.diagnostics(
            params,
            grads,
            norms_of_one_group,
            batch_size=batch_size,
            group_size=batch_size,
            trust_coefficient=LARS_TRUST_COEFFICIENT,
            max_trust_ratio=math.inf,
        )
        return {"trust_ratio": quantities.trust_ratio}

    transformation = optax.GradientTransformationExtraArgs(chain.init, update)
    return Optimizer(transformation, needs_norms=False, diagnose=diagnose)


def _sgd(learning_rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float) -> Optimizer:
    def diagnose(params: Any, grads: Any, norms: Any, axis_name: str | None) -> dict[str, Any]:
        del grads, norms, axis_name
        return {"trust_ratio": jax.tree.map(lambda _: jnp.ones(()), params)}

    transformation = optax.chain(
        optax.add_decayed_weights(weight_decay, clars_optax.default_mask),
        optax.sgd(learning_rate, momentum),
    )
    return Optimizer(
        optax.with_extra_args_support(transformation), needs_norms=False, diagnose=diagnose
    )
