"""Per-example gradients in the place of their norms."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clars_optax._checks import check_real
from clars_optax._trees import leaf_name, listed
from clars_optax._trust_ratio import l2_norm


def from_example_grads(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer that needs per-example gradient norms take per-example gradients.

    Each leaf of the updates carries the N examples on its first axis. ``tx`` gets their mean as its
    updates and the norm of every example's gradient, float32 of shape [N], as
    ``example_grad_norms``. Parameters and state are those of ``tx``. It goes around all others, as
    in ``from_example_grads(optax.masked(...))``.

    Args:
      tx: the optimizer, :func:`clars` for instance.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: if ``tx`` is no transformation; from ``update`` if a leaf is not a real
        floating-point array.
      ValueError: from ``update`` if the leaves do not share a leading axis.

    Example:
      >>> import clars_optax
      >>> import jax
      >>> import jax.numpy as jnp
      >>> tx = clars_optax.from_example_grads(clars_optax.clars(learning_rate=1.0))
      >>> params, xs = jnp.eye(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> loss_fn = lambda w, x: jnp.sum((w @ x) ** 2)
      >>> example_grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, xs)
      >>> updates, state = tx.update(example_grads, tx.init(params), params)
      >>> updates.shape
      (2, 2)
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"`tx` is of type {type(tx).__name__}: expected is an optimizer of Optax. Pass "
            "`clars_optax.clars(learning_rate)`, for instance."
        )
    tx = optax.with_extra_args_support(tx)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_real("updates", updates)
        shapes = [
            (leaf_name(p), jnp.shape(g)) for p, g in jax.tree_util.tree_leaves_with_path(updates)
        ]
        if len({shape[:1] for _, shape in shapes}) > 1 or any(not sum(s[:1]) for _, s in shapes):
            raise ValueError(
                "`from_example_grads` expects per-example gradients: updates whose leaves all have "
                f"the examples on their first axis. Got {listed(f'{p}: {s}' for p, s in shapes)}. "
                "Get them from `jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))`."
            )
        norms = jax.tree.map(jax.vmap(l2_norm), updates)
        means = jax.tree.map(lambda g: jnp.mean(g, axis=0), updates)
        return tx.update(means, state, params, example_grad_norms=norms, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
