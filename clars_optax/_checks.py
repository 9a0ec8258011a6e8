"""The checks of what an optimizer and `diagnostics` are given."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clars_optax._trees import described, is_hole, key_names, leaf_name, listed


def check_scalars(**arguments: Any) -> None:
    """Refuses hyperparameters that are not one number each, which would broadcast.

    Raises:
      TypeError: an argument is not a real scalar.
    """
    for name, value in arguments.items():
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if hasattr(value, "dtype"):
            is_integer = jnp.issubdtype(value.dtype, jnp.integer)
        if not (is_integer or _is_real(value)) or np.shape(value) != ():
            raise TypeError(
                f"`{name}` is {described(value)}: expected is a number. Pass a real scalar."
            )


def check_non_negative(**arguments: Any) -> None:
    """Refuses hyperparameters that are no scalars, negative or NaN.

    Raises:
      TypeError, ValueError: as said.
    """
    check_scalars(**arguments)
    for name, value in arguments.items():
        try:
            number = float(value)
        except jax.errors.ConcretizationTypeError:  # traced, as under `inject_hyperparams`
            continue
        if math.isnan(number) or number < 0:
            raise ValueError(f"`{name}` is {value}: expected is a number of at least 0.")


def check_bools(**arguments: Any) -> None:
    """Refuses switches that are no booleans: a string is true, and a tracer fails much later.

    Raises:
      TypeError: as said.
    """
    for name, value in arguments.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"`{name}` is {value!r}: expected is True or False.")


def check_alike(
    first_name: str, first: Any, second_name: str, second: Any, *, ignore_masked: bool = False
) -> None:
    """Refuses two trees that are not of the same parameters.

    With `ignore_masked`, the second may hold anything where the first is masked.

    Raises:
      TypeError: a leaf is not a real floating-point array.
      ValueError: paths or shapes differ.
    """
    treedef: Any
    leaves, treedef = jax.tree_util.tree_flatten_with_path(first, is_leaf=is_hole)
    try:
        pairs = [
            (path, leaf, other)
            for (path, leaf), other in zip(leaves, treedef.flatten_up_to(second), strict=True)
            if not is_hole(leaf) or (jax.tree.leaves(other) and not ignore_masked)
        ]
    except (TypeError, ValueError):
        pairs = None
    if pairs is None or not jax.tree_util.all_leaves([x for *_, x in pairs], is_leaf=is_hole):
        raise ValueError(
            f"`{first_name}` and `{second_name}` are different trees: "
            f"{_difference(first_name, first, second_name, second)}. Pass trees of the same "
            "parameters."
        )
    for path, leaf, other in pairs:
        for name, value in ((first_name, leaf), (second_name, other)):
            if not _is_real(value):
                raise TypeError(
                    f"`{name}` at {leaf_name(path)} is {described(value)}: expected is a real "
                    "floating-point array. Convert it, or leave it out with `optax.masked`."
                )
        if np.shape(leaf) != np.shape(other):
            raise ValueError(
                f"`{first_name}` at {leaf_name(path)} has shape {np.shape(leaf)}, but "
                f"`{second_name}` has shape {np.shape(other)} there. Pass trees of the same "
                "parameters."
            )


def check_real(name: str, tree: Any) -> None:
    """Refuses a tree with a leaf that is not a real floating-point array.

    Raises:
      TypeError: as said.
    """
    check_alike(name, tree, name, tree)


def checked_mask(argument: str, mask: Any) -> Callable[[Any], Any]:
    """Makes a mask a function of the tree; None masks nothing out, as in Optax.

    The function raises:
      TypeError: the mask has other leaves than booleans.
      ValueError: the mask is not a prefix of the tree.
    """
    mask = True if mask is None else mask

    def of_tree(tree: Any) -> Any:
        # A model of Equinox may be a tree of booleans and callable all the same.
        leaves = jax.tree.leaves(mask)
        found = mask(tree) if leaves and all(map(callable, leaves)) else mask
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            if not isinstance(leaf, bool | np.bool_):
                raise TypeError(
                    f"`{argument}` at {leaf_name(path)} is {described(leaf)}: expected is a "
                    "Python boolean, which does not depend on values."
                )
        try:
            jax.tree.broadcast(found, tree)
        except ValueError:
            raise ValueError(
                f"`{argument}` does not fit `params`: "
                f"{_difference(argument, found, 'params', tree)}. Pass a bool, a tree of bools like"
                " the parameters, a prefix of one, or a function that returns one."
            ) from None
        return found

    return of_tree


def _is_real(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return isinstance(x, float) or (dtype is not None and jnp.issubdtype(dtype, jnp.floating))


def _difference(first_name: str, first: Any, second_name: str, second: Any) -> str:
    """Says where two trees differ: by their paths, or else by their containers."""
    one, other = (
        {
            key_names(path): leaf_name(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole)
        }
        for tree in (first, second)
    )
    differences = [
        f"only `{name}` has {listed(paths[key] for key in sorted(only))}"
        for name, paths, only in (
            (first_name, one, one.keys() - other.keys()),
            (second_name, other, other.keys() - one.keys()),
        )
        if only
    ]
    return ", ".join(differences) or "the paths are the same, but in other containers"
