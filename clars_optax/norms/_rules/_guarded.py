"""A kernel where it can be run, and other means to the same end elsewhere."""

from collections.abc import Callable
from typing import Any

import jax

from clars_optax.norms._rules._geometry import Geometry
from clars_optax.norms._rules._products import squared, sum_of_rows
from clars_optax.norms._rules._shares import Kernel, is_shared_out, shared_out
from clars_optax.norms._rules._ways import Platform, Squares

Direct = Callable[[jax.Array, jax.Array], Squares]

# What JAX calls the kinds of devices.
_NAMES = {"gpu": ("cuda", "rocm"), "tpu": ("tpu",)}


def guarded(
    kernel: Kernel,
    finish: Callable[..., Squares],
    geometry: Geometry,
    direct: Direct,
    device: Platform,
) -> Direct:
    """The kernel, and `direct` for derivatives and on other kinds of devices.

    Where the compiler shares out the program, `direct` also takes its place under `vmap`.
    """

    def alone(x: jax.Array, g: jax.Array) -> Squares:
        return finish(*kernel(geometry, x, g))

    def on_devices(x: jax.Array, g: jax.Array) -> Squares:
        return finish(*shared_out(kernel, geometry, x, g))

    run_kernel = _unless_mapped(on_devices, direct) if is_shared_out() else alone

    @jax.custom_jvp
    def run(x: jax.Array, g: jax.Array) -> Squares:
        if device.interprets:
            return run_kernel(x, g)
        kernels = dict.fromkeys(_NAMES[device.kernels], run_kernel)
        return jax.lax.platform_dependent(x, g, default=direct, **kernels)

    run.defjvp(lambda primals, tangents: jax.jvp(direct, primals, tangents))
    return run


def guarded_rows(
    kernel: Kernel,
    scale: float,
    place: Callable[[jax.Array], jax.Array],
    geometry: Geometry,
    direct: Direct,
    device: Platform,
) -> Direct:
    """Likewise, for a kernel that makes the gradients of all groups.

    Args:
      kernel: its only result are the gradients, groups first.
      scale: a factor for the gradients of which the norms are wanted.
      place: brings their sum into the parameter's shape.
      geometry: where things are.
      direct: as for `guarded`.
      device: what the program will run on.
    """

    def finish(rows: jax.Array) -> Squares:
        return Squares(squared(rows * scale), place(sum_of_rows(rows)))

    return guarded(kernel, finish, geometry, direct, device)


def _unless_mapped(kernel: Direct, direct: Direct) -> Direct:
    """The kernel, but under `vmap` `direct`."""
    run: Any = jax.custom_batching.custom_vmap(kernel)

    @run.def_vmap
    def _(_: int, is_mapped: Any, x: jax.Array, g: jax.Array) -> tuple[Squares, Any]:
        found = jax.vmap(direct, [0 if one else None for one in is_mapped])(x, g)
        return found, jax.tree.map(lambda _: True, found)

    return run
