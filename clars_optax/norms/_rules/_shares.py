"""A kernel's work in shares: for several devices, and for arrays of any size.

Under `jit`, with arrays that lie on several devices, XLA decides what each of them computes. It
cannot cut a kernel, and would have every device do all of the work; here it is told how to cut it.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clars_optax.norms._rules._geometry import Geometry
from clars_optax.norms._rules._shardings import named

# Offsets in the kernels have 32 bits.
_LARGEST = 2**31 - 1

Results = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Kernel:
    """What is to be known of a kernel to cut its work.

    Attributes:
      run: the kernel, for images and cotangents that lie as a geometry says. All else it knows by
        keywords.
      results: the axes of its results, a letter each: `n` are the groups, `d` and `p` the channels
        of a block, in images and in cotangents. A result that lacks one of them is a sum over it.
      largest: entries of the largest of its arrays.
    """

    run: functools.partial[Any]
    results: Sequence[str]
    largest: Callable[[Geometry], int]

    def takes(self, geometry: Geometry) -> bool:
        """Whether the arrays of a single group are small enough."""
        return self.largest(replace(geometry, groups=1)) <= _LARGEST

    def __call__(self, geometry: Geometry, x: jax.Array, g: jax.Array) -> Results:
        """Runs it, one half of the groups after the other where the arrays are too large."""
        if geometry.groups == 1 or self.largest(geometry) <= _LARGEST:
            return self.run(geometry, x, g)
        half = geometry.groups // 2
        halves = [
            self(replace(geometry, groups=len(images)), images, cotangents)
            for images, cotangents in ((x[:half], g[:half]), (x[half:], g[half:]))
        ]
        return tuple(
            jnp.concatenate(made, axes.index("n")) if "n" in axes else sum(made)
            for axes, made in zip(self.results, zip(*halves, strict=True), strict=True)
        )


def is_shared_out() -> bool:
    """Whether the compiler shares out the program that is being traced among several devices.

    Inside of `pmap` and `jax.shard_map` each device has a program of its own.
    """
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().are_all_axes_manual


def shared_out(kernel: Kernel, geometry: Geometry, x: jax.Array, g: jax.Array) -> Results:
    """Runs a kernel where the compiler shares out the program.

    Each device takes its own groups, as the examples lie, and its own channels, where those are
    sharded. What else is sharded, the positions of an image for one, is gathered before.

    Args:
      kernel: the kernel.
      geometry: where things are, on all devices together.
      x: the images.
      g: the cotangents.
    """
    pieces = {"n": geometry.groups}
    channels = ["inner", "outer"]
    if geometry.blocks == 1 and not geometry.folded:
        # Kernels want them in whole words of four bytes.
        in_a_word = max(1, 4 // x.dtype.itemsize)
        pieces |= {"d": geometry.inner // in_a_word, "p": geometry.outer // in_a_word}
        channels = ["d", "p"]
    operands = [
        ["n", *(f"{name}{axis}" for axis in range(z.ndim - 2)), channel]
        for name, z, channel in zip("xg", (x, g), channels, strict=True)
    ]
    operands.append(["key"])
    # Those that are not cut, in the order of their appearance, as Shardy wants to have them.
    factors = dict.fromkeys(itertools.chain(*operands, *kernel.results))

    def partition(mesh: Any, types: Any, _: Any) -> tuple[Any, ...]:
        mesh, (of_x, of_g, _) = named(mesh, types)
        axes = _cut(mesh, pieces, {"n": of_x[0] or of_g[0], "d": of_x[-1], "p": of_g[-1]})
        shares = {letter: _number(mesh, names) for letter, names in axes.items()}
        local = replace(
            geometry,
            groups=geometry.groups // shares["n"],
            inner=geometry.inner // shares["d"],
            outer=geometry.outer // shares["p"],
        )

        def on_each(x: jax.Array, g: jax.Array, _: jax.Array) -> Results:
            return tuple(
                jax.lax.psum(
                    made, [name for letter in axes if letter not in result for name in axes[letter]]
                )
                for result, made in zip(kernel.results, kernel(local, x, g), strict=True)
            )

        def placed(letters: Sequence[str]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(axes.get(one) or None for one in letters)))

        return mesh, on_each, tuple(map(placed, kernel.results)), tuple(map(placed, operands))

    run = custom_partitioning(lambda x, g, _: kernel(geometry, x, g))
    run.def_partition(
        partition,
        # Where a group lies on several devices, a part of a mesh's axis has no name for JAX.
        decode_shardings=False,
        sharding_rule=" -> ".join(
            ", ".join(map(" ".join, arrays)) for arrays in (operands, kernel.results)
        ),
        need_replication_factors=tuple(factor for factor in factors if factor not in pieces),
    )
    return run(x, g, _key(geometry, kernel.run.func.__name__, kernel.run.keywords))


def _key(*values: Any) -> jax.Array:
    """Something of a program for which its kernel is the only one.

    Without it, programs whose kernels differ, for they come in when it is compiled, could be the
    same to JAX's compilation cache.
    """
    return jnp.asarray(list(hashlib.sha256(repr(values).encode()).digest()[:8]), jnp.uint8)


def _cut(
    mesh: Mesh, pieces: dict[str, int], axes: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Which of the axes of a mesh, over which something is sharded, cut it for the kernel.

    Args:
      mesh: the mesh.
      pieces: how many pieces there are of what can be cut.
      axes: for each letter, those over which it is sharded.
    """
    found: dict[str, tuple[str, ...]] = {}
    for letter, names in axes.items():
        is_free = not any({*names} & {*others} for others in found.values())
        is_even = pieces.get(letter, 1) % _number(mesh, names) == 0
        found[letter] = names if is_free and is_even else ()
    return found


def _number(mesh: Mesh, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)
