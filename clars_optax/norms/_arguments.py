"""The checks of what `value_and_grad_and_norms` is given: before anything is traced."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Settings:
    """The options, as `value_and_grad_and_norms` documents them.

    Raises:
      TypeError, ValueError: an option has the wrong type, or a value that is not allowed.
    """

    argnums: int | Sequence[int]
    has_aux: bool
    batch_argnums: int | Sequence[int]
    rng_argnums: int | Sequence[int]
    group_size: int
    num_norm_examples: int | None
    microbatch_size: int | None
    loss_reduction: Literal["mean", "sum"]
    method: Literal["auto", "generic"]

    def __post_init__(self) -> None:
        for name in ("argnums", "batch_argnums", "rng_argnums"):
            positions = getattr(self, name)
            if not all(_is_integer(position) for position in _as_tuple(positions)):
                raise TypeError(f"{name} must be an int or a tuple of ints, got {positions!r}.")
        for name in ("argnums", "batch_argnums"):
            if not _as_tuple(getattr(self, name)):
                raise ValueError(f"{name} is empty: name at least one positional argument.")
        if not isinstance(self.has_aux, bool | np.bool_):
            raise TypeError(f"has_aux must be True or False, got {self.has_aux!r}.")
        for name in ("group_size", "num_norm_examples", "microbatch_size"):
            size = getattr(self, name)
            if size is None and name != "group_size":
                continue
            if not _is_integer(size):
                raise TypeError(f"{name} must be an int, got {size!r}.")
            least = 0 if name == "num_norm_examples" else 1
            if size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}.")
            # NumPy's integers overflow where sizes are multiplied.
            object.__setattr__(self, name, int(size))
        for name in ("num_norm_examples", "microbatch_size"):
            size = getattr(self, name)
            if size is not None and size % self.group_size:
                raise ValueError(
                    f"{name}={size} must be a multiple of group_size={self.group_size}: a group "
                    "cannot be cut."
                )
        for name, allowed in (("loss_reduction", ("mean", "sum")), ("method", ("auto", "generic"))):
            given = getattr(self, name)
            if not isinstance(given, str) or given not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {given!r}.")

    def positions(self, num_args: int) -> "Positions":
        """The positions of the arguments in a call with so many.

        Raises:
          ValueError: a position is out of range, or an argument has two roles.
        """
        found = {
            name: tuple(self._position(name, index, num_args) for index in _as_tuple(given))
            for name, given in (
                ("argnums", self.argnums),
                ("batch_argnums", self.batch_argnums),
                ("rng_argnums", self.rng_argnums),
            )
        }
        roles: dict[int, str] = {}
        for name, indices in found.items():
            for index in indices:
                if index in roles:
                    raise ValueError(
                        f"Argument {index} is in {name} and in {roles[index]}; an argument has one "
                        "role only."
                        if roles[index] != name
                        else f"{name} names argument {index} twice."
                    )
                roles[index] = name
        return Positions(found["argnums"], found["batch_argnums"], found["rng_argnums"])

    def _position(self, name: str, index: int, num_args: int) -> int:
        if not -num_args <= index < num_args:
            raise ValueError(
                f"{name} names argument {index}, but the call has {num_args} positional arguments. "
                "Pass it by position: keyword arguments are handed on as they are."
            )
        return index % num_args

    def num_norms(self, num_examples: int) -> int:
        """How many examples have norms, in a batch of so many.

        Raises:
          ValueError: the batch cannot be divided as the options ask.
        """
        if num_examples == 0:
            raise ValueError("The batch is empty: its arguments have length 0 on axis 0.")
        for name, unit in (("group_size", 1), ("microbatch_size", self.group_size)):
            size = getattr(self, name)
            if size is not None and num_examples % size:
                near = [n for n in range(unit, num_examples + 1, unit) if num_examples % n == 0]
                near = sorted(sorted(near, key=lambda n: abs(n - size))[:8])
                raise ValueError(
                    f"{name}={size} does not divide the batch of {num_examples} examples; "
                    f"{', '.join(map(str, near))} would."
                )
        if self.num_norm_examples is None:
            return num_examples
        if self.num_norm_examples > num_examples:
            raise ValueError(
                f"num_norm_examples={self.num_norm_examples} is more than the batch of "
                f"{num_examples} examples."
            )
        return self.num_norm_examples


@dataclass(frozen=True)
class Positions:
    """Which positional arguments are the parameters, the batch and the random keys."""

    params: tuple[int, ...]
    batch: tuple[int, ...]
    rng: tuple[int, ...]


def _is_integer(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _as_tuple(positions: Any) -> tuple[Any, ...]:
    return tuple(positions) if isinstance(positions, (tuple, list)) else (positions,)


def paths(args: Sequence[Any], positions: Sequence[int]) -> list[str]:
    """The path of every leaf of some arguments, as an error shows it: `args[0]['kernel']`."""
    return [
        f"args[{position}]{jax.tree_util.keystr(path)}"
        for position in positions
        for path, _ in jax.tree_util.tree_leaves_with_path(args[position])
    ]


def check_params(args: Sequence[Any], positions: Sequence[int]) -> None:
    """Refuses parameters that have no gradient.

    Raises:
      TypeError: a leaf is not a real floating-point array.
    """
    leaves = jax.tree.leaves([args[position] for position in positions])
    for path, leaf in zip(paths(args, positions), leaves, strict=True):
        dtype = getattr(leaf, "dtype", None)
        kind = type(leaf).__name__ if dtype is None else dtype
        if kind != "float" and (dtype is None or not jnp.issubdtype(dtype, jnp.floating)):
            raise TypeError(
                "value_and_grad_and_norms requires real floating-point parameters (inputs of "
                f"argnums), but {path} has the type {kind}. Take it out of the tree of parameters, "
                "or out of argnums."
            )


def arrays(args: Sequence[Any], positions: Sequence[int]) -> list[jax.Array]:
    """The leaves of some arguments, as arrays.

    Raises:
      TypeError: JAX has no such arrays.
    """
    found = []
    leaves = jax.tree.leaves([args[position] for position in positions])
    for path, leaf in zip(paths(args, positions), leaves, strict=True):
        try:
            found.append(jnp.asarray(leaf))
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(
                f"{path} is of type {type(leaf).__name__}"
                + (f" and dtype {leaf.dtype}" if hasattr(leaf, "dtype") else "")
                + ", which JAX cannot make an array of. Convert it to numbers, or pass it in an "
                "argument outside of argnums and batch_argnums."
            ) from error
    return found


def count_examples(paths: Sequence[str], batch: Sequence[jax.Array]) -> int:
    """The batch size.

    Raises:
      ValueError: there is no array, an array without axes, or arrays that disagree.
    """
    found: dict[int, str] = {}
    for path, leaf in zip(paths, batch, strict=True):
        if not leaf.shape:
            raise ValueError(
                f"{path} is a scalar, but axis 0 of every leaf of the batch_argnums carries the "
                "examples. Pass what all examples share in an argument of its own."
            )
        found.setdefault(leaf.shape[0], path)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise ValueError(
            f"The batch arguments disagree on the number of examples: {first} has {one} on axis 0, "
            f"{second} has {other}."
        )
    if not found:
        raise ValueError("The batch_argnums hold no arrays: name the arguments with the examples.")
    return next(iter(found))


def check_keys(args: Sequence[Any], kwargs: dict[str, Any], positions: Positions) -> None:
    """Refuses random keys that all micro-batches would share, and all but keys in `rng_argnums`.

    Raises:
      TypeError: an argument in `rng_argnums` holds something else than single keys.
      ValueError: an argument outside of `rng_argnums` holds a key.
    """
    keys = jax.tree.leaves([args[index] for index in positions.rng])
    for path, leaf in zip(paths(args, positions.rng), keys, strict=True):
        if not is_key(leaf) or leaf.shape != (_raw_key_shape() if leaf.dtype == jnp.uint32 else ()):
            shape = f" and shape {leaf.shape}" if hasattr(leaf, "shape") else ""
            raise TypeError(
                f"{path} is of type {type(leaf).__name__}{shape}, but with microbatch_size every "
                "leaf of the rng_argnums is a single random key. Split keys inside of loss_fn, and "
                "take what is no key out of rng_argnums, of a Flax NNX module by nnx.split(model, "
                "nnx.Param, nnx.RngKey, ...)."
            )
    named = {*positions.batch, *positions.rng}
    others = [index for index in range(len(args)) if index not in named]
    leaves = jax.tree.leaves([args[index] for index in others])
    shared = list(zip(paths(args, others), leaves, strict=True))
    for place, leaf in jax.tree_util.tree_leaves_with_path(kwargs):
        shared.append((f"kwargs{jax.tree_util.keystr(place)}", leaf))
    for path, leaf in shared:
        if is_key(leaf):
            raise ValueError(
                f"{path} is a random key, or looks like one: with microbatch_size, all "
                "micro-batches would draw the same numbers from it. Pass it by position and name "
                "its argument in rng_argnums: every micro-batch then gets a key of its own. Convert"
                " what is no key to int32."
            )


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed random keys, or what looks like raw ones."""
    if not hasattr(leaf, "dtype"):
        return False
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return True
    return leaf.dtype == jnp.uint32 and leaf.shape[-1:] == _raw_key_shape()


def _raw_key_shape() -> tuple[int, ...]:
    # Of a new function: JAX remembers the types of one that it knows, whatever kind of key is set.
    return jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape
