"""The gradients of all groups for a kernel that sees one channel at a time: a kernel for GPUs.

There is no matrix product in it, and the gradients are small. What counts is that images and
cotangents come from memory once for nine taps, not for each tap or two: every program holds the
gradient of one group, for some channels and taps, in registers. Its sums are written once and added
in a fixed order. In Pallas, like `_kernel`, of which all else holds here.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._geometry import Geometry, starts
from clars_optax.norms._rules._kernel import MULTIPROCESSORS, like

# Products of channels and uses for a program at a time, eight for a thread.
_PRODUCTS = 1024
# Channels of a program, if there are as many: a whole line of memory in two bytes each.
_CHANNELS = 64
# Their sums, beside operands and offsets, leave registers for several programs.
_TAPS = 9
# That many to a multiprocessor hide each other's waiting.
_PROGRAMS = 4


@dataclass(frozen=True)
class Cuts:
    """How the work is cut.

    Attributes:
      channels: those of a program.
      uses: uses of the weights that a program multiplies at a time.
      taps: entries of the kernel, for a program.
      channel_runs: programs side by side, for all channels.
      tap_runs: likewise, for all taps.
      parts: likewise, for all uses.
      steps: how often a program multiplies so many uses.
    """

    channels: int
    uses: int
    taps: int
    channel_runs: int
    tap_runs: int
    parts: int
    steps: int

    @classmethod
    def of(cls, geometry: Geometry) -> "Cuts":
        """Chooses sizes."""
        num_channels = geometry.blocks * geometry.outer
        # Half of a program with all of them would be empty.
        channels = _CHANNELS if num_channels > _CHANNELS // 2 else _CHANNELS // 2
        uses = _PRODUCTS // channels
        taps = min(geometry.taps, _TAPS)
        channel_runs = math.ceil(num_channels / channels)
        tap_runs = math.ceil(geometry.taps / taps)
        steps = math.ceil(geometry.uses / uses)
        programs = geometry.groups * channel_runs * tap_runs
        parts = min(steps, math.ceil(_PROGRAMS * MULTIPROCESSORS / programs))
        return cls(channels, uses, taps, channel_runs, tap_runs, parts, math.ceil(steps / parts))


def gradients_of_groups(
    geometry: Geometry, x: jax.Array, g: jax.Array, *, interpret: bool
) -> tuple[jax.Array]:
    """Runs the kernel.

    Args:
      geometry: where things are; one input channel for a block.
      x: the images.
      g: the cotangents, of the same dtype.
      interpret: whether Pallas's interpreter runs it, on any device.

    Returns:
      The gradients `[G, taps, B * P]`, float32, in a tuple.
    """
    # Here, so that the library can be imported where Pallas cannot.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    cuts = Cuts.of(geometry)
    num_channels = geometry.blocks * geometry.outer
    shape = (cuts.parts, geometry.groups, geometry.taps, num_channels)

    def kernel(x_ref: Any, g_ref: Any, sums_ref: Any) -> None:
        rest, channel_run = jnp.divmod(pl.program_id(0), cuts.channel_runs)
        rest, tap_run = jnp.divmod(rest, cuts.tap_runs)
        part, group = jnp.divmod(rest, geometry.groups)
        channels = channel_run * cuts.channels + jnp.arange(cuts.channels, dtype=jnp.int32)
        is_channel = channels < num_channels
        taps = [tap_run * cuts.taps + index for index in range(cuts.taps)]

        def add(index: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            step = part * cuts.steps + index
            uses = step * cuts.uses + jnp.arange(cuts.uses, dtype=jnp.int32)
            _, g_starts, _ = starts(geometry, group, 0, 0, uses)
            c = triton.load(
                g_ref.at[g_starts[:, None] + channels[None, :]],
                mask=(uses < geometry.uses)[:, None] & is_channel[None, :],
                other=0,
            ).astype(jnp.float32)
            added = []
            for tap, total in zip(taps, sums, strict=True):
                x_starts, _, is_inside = starts(geometry, group, 0, tap, uses)
                a = triton.load(
                    x_ref.at[x_starts[:, None] + (channels // geometry.outer)[None, :]],
                    mask=is_inside[:, None] & is_channel[None, :],
                    other=0,
                )
                added.append(total + a.astype(jnp.float32) * c)
            return added

        zeros = jnp.zeros((cuts.uses, cuts.channels), jnp.float32)
        sums = jax.lax.fori_loop(0, cuts.steps, add, [zeros] * cuts.taps)
        for tap, total in zip(taps, sums, strict=True):
            stored = ((part * geometry.groups + group) * geometry.taps + tap) * num_channels
            triton.store(
                sums_ref.at[stored + channels],
                jnp.sum(total, axis=0),
                mask=is_channel & (tap < geometry.taps),
            )

    call = pl.pallas_call(
        kernel,
        out_shape=like(x, [(math.prod(shape),)]),
        grid=(cuts.parts * geometry.groups * cuts.tap_runs * cuts.channel_runs,),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_PRODUCTS // 256, num_stages=2),
        name="depthwise_gradients",
    )
    (sums,) = call(x.reshape(-1), g.reshape(-1))
    return (sums.reshape(shape).sum(0),)
