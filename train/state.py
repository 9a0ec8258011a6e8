"""What a step changes: parameters, optimizer state and BatchNorm's running averages."""

from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's `TrainState` for optimizers that take per-example gradient norms, and for BatchNorm.

    Flax's own `apply_gradients` has no way to hand extra arguments to the optimizer.

    Attributes:
        batch_stats: BatchNorm's running averages.
    """

    batch_stats: Any

    def apply_gradients(
        self, *, grads: Any, example_grad_norms: Any = None, **changes: Any
    ) -> "TrainState":
        """Takes a step of the optimizer.

        Args:
            grads: the gradient, a tree like `params`.
            example_grad_norms: what `clars_optax.value_and_grad_and_norms` gives, averaged over the
                devices; optimizers that need no norms ignore it.
            **changes: other fields to replace, such as `batch_stats`.
        """
        updates, opt_state = self.tx.update(
            grads, self.opt_state, self.params, example_grad_norms=example_grad_norms
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)
