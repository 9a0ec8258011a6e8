"""Meshes with explicit axes: the step is computed with automatic ones.

On an explicit mesh, the type of an array says how it is sharded, and an operation to whose result
that does not carry over is an error. Cutting a sharded batch into groups is such an operation. With
automatic axes, the compiler finds a sharding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def explicit_mesh(tree: Any) -> Any:
    """The mesh whose explicit axes an array in a tree is sharded over, or None."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            sharding = jax.typeof(leaf).sharding
            if AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
                return sharding.mesh
    return None


def specs(tree: Any) -> Any:
    """How the arrays in a tree, or their types, are sharded."""

    def spec(leaf: Any) -> PartitionSpec:
        is_type = isinstance(leaf, jax.ShapeDtypeStruct)
        # Where the mesh is empty, the type of an array has no sharding to speak of.
        sharding = leaf.sharding if is_type else jax.typeof(leaf).sharding
        return PartitionSpec() if sharding is None else sharding.spec

    return jax.tree.map(spec, tree)


def with_automatic_axes(
    function: Callable[..., Any],
    mesh: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out_sharding: Any,
) -> Any:
    """Calls a function that does not see how its arguments are sharded.

    Args:
      function: what to call.
      mesh: as `explicit_mesh` returns it.
      args: the positional arguments.
      kwargs: the keyword arguments.
      out_sharding: how the results are to be sharded.
    """
    leaves, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def of_arrays(arrays: Sequence[Any]) -> Any:
        everything = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            everything[place] = array
        args, kwargs = jax.tree.unflatten(treedef, everything)
        return function(*args, **kwargs)

    with jax.sharding.use_abstract_mesh(mesh):
        # Inside of a `jax.shard_map` over others they stay as they are.
        explicit = tuple(
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        )
        run = jax.sharding.auto_axes(of_arrays, axes=explicit, out_sharding=out_sharding)
        return run([leaves[place] for place in places])
