"""Numbers that are not finite: found on the devices, named on the host."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.text import listed

_MOST_NAMES = 3


def finite_leaves(tree: Any) -> jax.Array:
    """Says of each leaf whether all of it is finite.

    Args:
        tree: arrays.

    Returns:
        bool [number of leaves], in the order of `jax.tree.leaves`.
    """
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves) if leaves else jnp.ones(0, bool)


def describe(finite: Mapping[str, np.ndarray], trees: Mapping[str, Any]) -> str | None:
    """Names what is not finite.

    Args:
        finite: by what it is called, what `finite_leaves` has found of it.
        trees: likewise, a tree of the same structure.

    Returns:
        Such as "the gradient of head/bias and stem/kernel", or None where all is finite.
    """
    parts = []
    for what, flags in finite.items():
        if flags.all():
            continue
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(trees[what])
        ]
        broken = [path for path, is_finite in zip(paths, flags, strict=True) if not is_finite]
        parts.append(f"the {what}{_of(broken, len(paths))}")
    return "; ".join(parts) or None


def _of(paths: list[str], total: int) -> str:
    if total == 1:
        return ""
    if len(paths) == total:
        return f" of all {total} leaves"
    if len(paths) > _MOST_NAMES:
        paths = [*paths[:_MOST_NAMES], f"{len(paths) - _MOST_NAMES} other leaves"]
    return f" of {listed(paths, 'and')}"
