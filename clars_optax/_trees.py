"""Leaves, paths and holes of trees, and how errors name them."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax


def is_hole(node: Any) -> bool:
    """Whether there is no leaf where another tree has one."""
    return node is None or isinstance(node, optax.MaskedNode)


def leaf_name(path: tuple[Any, ...]) -> str:
    """Says where a leaf is, for error messages."""
    return jax.tree_util.keystr(path) or "the root"


def key_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys on the way to a leaf, of any containers, without the box of a variable."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def described(x: Any) -> str:
    """Says what came, for error messages."""
    if hasattr(x, "dtype"):
        return f"{x.dtype}{list(np.shape(x))}"
    return "None" if x is None else f"of type {type(x).__name__}"


def listed(names: Iterable[str], limit: int = 8) -> str:
    """The first names, separated by commas, and how many more there are."""
    names = list(names)
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(names[:limit] + more)
