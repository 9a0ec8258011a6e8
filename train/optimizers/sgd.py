"""SGD with momentum: the same rate for every layer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.optimizers.base import Optimizer, momentum_of_decayed


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    weight_decay: float,
    weight_decay_mask: Any,
    nesterov: bool = False,
) -> Optimizer:
    """Makes SGD with the heavy ball's or Nesterov's momentum and the decay in the gradient."""
    transformation = optax.chain(
        momentum_of_decayed(momentum, nesterov, weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def diagnose(
        params: Any, grads: Any, norms: Any, square_norms: Any, state: Any
    ) -> dict[str, Any]:
        del grads, norms, square_norms, state
        return {"trust_ratio": jax.tree.map(lambda _: jnp.ones(()), params)}

    return Optimizer(
        optax.with_extra_args_support(transformation), needs_norms=False, diagnose=diagnose
    )
