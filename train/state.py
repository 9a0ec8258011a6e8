"""What a step changes: weights, their average, optimizer state and BatchNorm's running averages."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's `TrainState` for optimizers that take per-example gradient norms, and for BatchNorm.

    Flax's own `apply_gradients` has no way to hand extra arguments to the optimizer.

    Attributes:
        batch_stats: BatchNorm's running averages.
        ema: exponential moving averages of `params` and `batch_stats`, by these names; None where
            none are kept.
        ema_decay: their decay rate per step.
    """

    batch_stats: Any
    ema: dict[str, Any] | None = None
    ema_decay: float | None = struct.field(pytree_node=False, default=None)

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What to evaluate, by the names of Flax: averages, where they are kept."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}

    def apply_gradients(  # type: ignore[override]
        self, *, grads: Any, batch_stats: Any, **extra_args: Any
    ) -> "TrainState":
        """Takes a step of the optimizer.

        Args:
            grads: the gradient, a tree like `params`.
            batch_stats: the new running averages.
            **extra_args: what the optimizer's `update` takes besides, such as
                `example_grad_norms`; optimizers that need none ignore them.
        """
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra_args)
        params = optax.apply_updates(self.params, updates)
        ema = self.ema
        if self.ema_decay is not None:
            # A smaller decay at first, as in TensorFlow's ExponentialMovingAverage: large batches
            # take few steps, and the initial weights should not outlive many of them.
            decay = jnp.minimum(self.ema_decay, (1 + self.step) / (10 + self.step))
            # BatchNorm's own averages are those of other weights.
            ema = optax.incremental_update(
                {"params": params, "batch_stats": batch_stats}, ema, 1 - decay
            )
        return self.replace(
            step=self.step + 1,
            params=params,
            opt_state=opt_state,
            batch_stats=batch_stats,
            ema=ema,
        )


DrawState = Callable[[jax.Array], TrainState]
"""Makes an initial state from a key."""


def draw_state(
    key: jax.Array,
    *,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    transformation: optax.GradientTransformation,
    ema_decay: float | None = None,
) -> TrainState:
    """Draws the initial parameters, and makes the state that goes with them.

    Args:
        key: the same key gives the same parameters.
        model: the network.
        image_shape: height, width and channels of an image.
        transformation: the optimizer.
        ema_decay: decay rate of the moving averages of weights and BatchNorm's running averages;
            None for no averages.
    """
    variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=transformation,
        batch_stats=variables["batch_stats"],
        ema=None
        if ema_decay is None
        else {name: variables[name] for name in ("params", "batch_stats")},
        ema_decay=ema_decay,
    )
    # Flax's 0 has a weak type, which a checkpoint does not keep: a run that goes on would compile
    # another program than the one that began it.
    return state.replace(step=jnp.zeros((), jnp.int32))
