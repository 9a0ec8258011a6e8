"""The trust ratio of a leaf, and the norms that belong to each leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from clars_optax._trees import described, is_hole, key_names, leaf_name, listed


def trust_ratio(
    param: jax.Array,
    mean_norm: jax.Array,
    trust_coefficient: ArrayLike,
    max_trust_ratio: ArrayLike,
    eps: ArrayLike,
) -> jax.Array:
    """Computes the ratio of one leaf, a float32 scalar, as in the table of `scale_by_clars`.

    Args:
      param: the leaf, of any shape and floating-point dtype.
      mean_norm: a scalar, the mean norm of its per-example gradients.
      trust_coefficient: as there.
      max_trust_ratio: as there.
      eps: as there.
    """
    trust_coefficient, max_trust_ratio, eps, mean_norm = (
        jnp.asarray(x, jnp.float32) for x in (trust_coefficient, max_trust_ratio, eps, mean_norm)
    )
    param_norm = l2_norm(param)
    is_zero = (param_norm == 0) | (mean_norm == 0)
    # The denominator is replaced, not only the quotient, lest a gradient through it be NaN.
    ratio = trust_coefficient * param_norm / jnp.where(is_zero, 1.0, mean_norm + eps)
    ratio = jnp.minimum(max_trust_ratio, jnp.where(is_zero, 1.0, ratio))
    return jnp.where(jnp.isfinite(mean_norm), ratio, jnp.nan)


def match_norms(params: Any, norms: Any, argument: str = "example_grad_norms") -> Any:
    """Returns a tree like `params` of float32 vectors or scalars; what is masked stays so.

    Raises:
      TypeError: a norm is not a real floating-point array.
      ValueError: a leaf has no norm, or one of a wrong shape.
    """
    treedef: Any
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_hole)
    try:
        candidates = treedef.flatten_up_to(norms)
    except (TypeError, ValueError):
        # Norms of the live leaves only, or in other containers (a FrozenDict, a Flax NNX State).
        named = jax.tree_util.tree_leaves_with_path(norms, is_leaf=is_hole)
        by_name = {key_names(path): norm for path, norm in named}
        candidates = [by_name.get(key_names(path)) for path, _ in leaves]
    matches = [(path, leaf, norm) for (path, leaf), norm in zip(leaves, candidates, strict=True)]

    missing = [
        leaf_name(path) + ("" if is_hole(norm) else f" (what is there is {described(norm)})")
        for path, leaf, norm in matches
        if not (is_hole(leaf) or isinstance(norm, float | int | complex) or hasattr(norm, "dtype"))
    ]
    if missing:
        raise ValueError(
            f"`{argument}` has no norm for {listed(missing)}. It must be a "
            "tree like `params`, with a vector of norms, or a scalar array, their mean, at each "
            "leaf."
        )
    return treedef.unflatten(
        leaf if is_hole(leaf) else _checked_norm(norm, f"`{argument}` at {leaf_name(path)}")
        for path, leaf, norm in matches
    )


def _checked_norm(norm: Any, name: str) -> jax.Array:
    dtype = norm.dtype if hasattr(norm, "dtype") else jnp.result_type(norm)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} has dtype {dtype}: expected are norms, floating-point numbers. Convert them "
            "to float32."
        )
    shape = np.shape(norm)
    if len(shape) > 1 or 0 in shape:
        raise ValueError(
            f"{name} has shape {shape}: expected is a vector, one norm per example or group, or a "
            "scalar, their mean. If these are the per-example gradients themselves, use "
            "`clars_optax.from_example_grads`."
        )
    norm = jnp.asarray(norm, jnp.float32)
    # Under `jit` there is no value to refuse; a mean could hide a negative one.
    return jnp.where(norm < 0, jnp.nan, norm)


def l2_norm(x: jax.Array) -> jax.Array:
    """Computes the norm of an array of any shape in float32, a scalar with a gradient at zero."""
    squares = jnp.sum(jnp.square(jnp.asarray(x, jnp.float32)))
    is_zero = squares == 0  # where the square root has no derivative
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squares)))
