"""How arrays lie on devices, where the compiler has decided that.

A group of examples that lies on several devices shards an array over a part of a mesh's axis. Such
a part has no name, so that JAX cannot say what sharding it is. On a mesh whose axes cannot be
divided it has one.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh


def named(mesh: Any, arrays: Sequence[Any]) -> tuple[Mesh, list[list[tuple[str, ...]]]]:
    """Finds the names of what arrays are sharded over.

    Args:
      mesh: the mesh on which the arrays lie, which may be empty.
      arrays: types of arrays, with any kind of sharding.

    Returns:
      A mesh of the same devices in the same order, with axes of prime size; and for each axis of
      each array the names of those that it is sharded over. There are none, as if it was not
      sharded, where that is not to be said in axes of this mesh.
    """
    maps = [
        # Of an array that every sharding divides.
        one.sharding.devices_indices_map((len(one.sharding.device_set),) * one.ndim)
        for one in arrays
    ]
    devices = list(maps[0])
    sizes = [p for size in mesh.axis_sizes or (len(devices),) for p in _prime_factors(size)]
    names = [f"axis_{axis}" for axis in range(len(sizes))]
    fine = Mesh(np.array(devices).reshape(sizes), names)
    return fine, [_sharded_over(fine, list(found.values())) for found in maps]


def _sharded_over(mesh: Mesh, indices: Sequence[tuple[slice, ...]]) -> list[tuple[str, ...]]:
    """For each axis of an array of which each device has some indices."""
    sizes = mesh.devices.shape
    first = np.eye(len(sizes), dtype=int)
    found = []
    for slices in zip(*indices, strict=True):
        starts = np.array([one.start or 0 for one in slices]).reshape(sizes)
        # How far one step along an axis of the mesh leads.
        steps = [starts[tuple(step)] for step in first]
        is_all = np.array_equal(np.tensordot(steps, np.indices(sizes), 1), starts)
        order = sorted(zip(steps, mesh.axis_names, strict=True), reverse=True)
        found.append(tuple(name for step, name in order if step) if is_all else ())
    return found


def _prime_factors(number: int) -> list[int]:
    for factor in range(2, math.isqrt(number) + 1):
        if number % factor == 0:
            return [factor, *_prime_factors(number // factor)]
    return [number] if number > 1 else []
