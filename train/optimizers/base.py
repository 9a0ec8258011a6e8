"""What the optimizers have in common."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import clars_optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer and what is plotted of it.

    Attributes:
        transformation: the optimizer; its `update` takes `example_grad_norms` and
            `example_grad_square_norms`, trees like the parameters of the mean norm of the
            per-example gradients and of the mean of its square.
        needs_norms: whether it reads them.
        diagnose: takes parameters, gradients, mean norms and mean squared norms (None where
            `needs_norms` is False) and the optimizer's state before the update, all averaged over
            the devices. It returns trees like the parameters by the name of the quantity, with
            "trust_ratio" always among them: what the step of each layer is multiplied by.
    """

    transformation: optax.GradientTransformationExtraArgs
    needs_norms: bool
    diagnose: Callable[[Any, Any, Any, Any, Any], dict[str, Any]]


def momentum_of_decayed(
    momentum: float, nesterov: bool, weight_decay: float, weight_decay_mask: Any
) -> optax.GradientTransformation:
    """Adds the decay to the gradient and accumulates both in a momentum buffer."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.trace(decay=momentum, nesterov=nesterov),
    )


def norms_of(tree: Any) -> Any:
    """Computes the norm of each leaf in float32."""
    return jax.tree.map(
        lambda leaf: jnp.linalg.norm(jnp.ravel(jnp.asarray(leaf, jnp.float32))), tree
    )


def trust_ratios(
    params: Any,
    updates: Any,
    *,
    trust_coefficient: float = 1.0,
    max_trust_ratio: float = math.inf,
    eps: float = 0.0,
) -> Any:
    """Computes min(max_trust_ratio, trust_coefficient ||w|| / (||u|| + eps)) for each leaf.

    It is 1 for biases and scales; where one of the norms is 0, too, if the maximum allows.

    Args:
        params: the parameters w.
        updates: what is scaled, u.
        trust_coefficient: factor of the ratio.
        max_trust_ratio: its upper bound.
        eps: added to the norm.
    """
    return clars_optax.diagnostics(
        params,
        updates,
        jax.tree.map(jnp.atleast_1d, norms_of(updates)),
        batch_size=1,
        trust_coefficient=trust_coefficient,
        max_trust_ratio=max_trust_ratio,
        eps=eps,
    ).trust_ratio
