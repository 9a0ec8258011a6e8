"""A step of training and of evaluation, mapped over the devices: the one place where this is done.

A batch comes to the devices in one piece, or in several where it is too large for them. On each
device a piece goes through the network in micro-batches, one after another in a `lax.scan`
(unrolled on a CPU, where loops are slow). Whatever the pieces and the micro-batches, the gradients
travel between the devices once, when the whole batch is through.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from train.body import Batch, EvalBody, Metrics, Sums, TrainBody
from train.state import DrawState, TrainState

AXIS = "devices"


def init_state(draw: DrawState, seed: int, devices: Sequence[jax.Device]) -> TrainState:
    """Draws the initial state and copies it to every device.

    Args:
        draw: makes the state from a key.
        seed: the same seed gives the same parameters.
        devices: those of all processes.
    """
    # Under jit, because one compilation is faster than one for each operation; with little
    # optimisation, for it runs once, and a CPU takes several seconds for better.
    jitted = jax.jit(draw, compiler_options={"xla_backend_optimization_level": 1})
    return replicate(jitted(jax.random.key(seed)), devices)


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Copies arrays to every device of this process, laid out as a step returns them.

    From any other layout the second step would compile again.
    """
    return jax.device_put(tree, _sharding(devices, jax.sharding.PartitionSpec()))


class Pieces(Protocol):
    """The pieces of the batches on their way to the devices, one after another."""

    def take(self) -> Batch:
        """Returns the next piece, laid out as `shard` does."""

    def prefetch(self) -> None:
        """Starts the piece after it on its way, while the devices compute."""


class TrainStep:
    """A training step, mapped over the devices.

    Args:
        body: what a device does.
        devices: those of all processes.
    """

    def __init__(self, body: TrainBody, devices: Sequence[jax.Device]) -> None:
        mapped = functools.partial(jax.pmap, axis_name=AXIS, devices=devices)
        self._accumulation = body.accumulation
        self._step = mapped(body.step, in_axes=(None, 0), out_axes=None, donate_argnums=0)
        self._finish = mapped(body.finish, in_axes=(None, 0), out_axes=None, donate_argnums=0)
        self._devices = devices
        self._accumulate = {
            num_norms: mapped(
                functools.partial(body.accumulate, num_norms=num_norms),
                in_axes=(None, 0, 0, None),
                donate_argnums=1,
            )
            for num_norms in map(
                body.accumulation.norm_examples_of, range(body.accumulation.pieces)
            )
        }
        self._sums: Sums | None = None

    def _zeros(self, state: TrainState) -> Sums:
        """Makes sums of nothing, for every device."""

        def zeros(shape: tuple[int, ...] = ()) -> jax.Array:
            return jnp.zeros((len(_local(self._devices)), *shape), jnp.float32)

        of_leaves = jax.tree.map(lambda _: zeros(), state.params)
        return Sums(
            loss=zeros(),
            accuracy=zeros(),
            batch_stats=jax.tree.map(lambda x: zeros(x.shape), state.batch_stats),
            grads=jax.tree.map(lambda x: zeros(x.shape), state.params),
            norms=of_leaves,
            square_norms=of_leaves,
        )

    def lower(self, state: TrainState, piece: Batch) -> dict[str, jax.stages.Lowered]:
        """Lowers the programs that make up a step, for what their compiled forms say of themselves.

        Args:
            state: arrays, or their shapes and types.
            piece: likewise, laid out as `shard` does.
        """
        if self._accumulation.pieces == 1:
            return {"step": self._step.lower(state, piece)}
        sums = jax.eval_shape(self._zeros, state)
        accumulate = self._accumulate[self._accumulation.norm_examples_of(0)]
        index = jax.ShapeDtypeStruct((), jnp.int32)
        return {
            "accumulate": accumulate.lower(state, sums, piece, index),
            "finish": self._finish.lower(state, sums),
        }

    def __call__(self, state: TrainState, pieces: Pieces) -> tuple[TrainState, Metrics]:
        """Takes a step, and has the first piece of the next one fetched meanwhile.

        It waits for the devices after every piece. CPU devices need that, for computations that are
        dispatched ahead of one another deadlock in their collectives; elsewhere it keeps the pieces
        that wait in memory to one.

        Args:
            state: is used up.
            pieces: one piece is taken, or as many as the accumulation says.
        """
        if self._accumulation.pieces == 1:
            done = self._step(state, pieces.take())
            pieces.prefetch()
            return jax.block_until_ready(done)
        if self._sums is None:
            share = jax.sharding.PartitionSpec(AXIS)
            self._sums = jax.jit(self._zeros, out_shardings=_sharding(self._devices, share))(state)
        sums = self._sums
        for index in range(self._accumulation.pieces):
            accumulate = self._accumulate[self._accumulation.norm_examples_of(index)]
            sums = accumulate(state, sums, pieces.take(), np.int32(index))
            pieces.prefetch()
            jax.block_until_ready(sums)
        self._sums = sums
        return jax.block_until_ready(self._finish(state, sums))


def pmap_eval_step(body: EvalBody, devices: Sequence[jax.Device]) -> EvalBody:
    """Maps an evaluation body over the devices, those of all processes."""
    return jax.pmap(body, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices)


def shard(batch: Batch, devices: Sequence[jax.Device]) -> Batch:
    """Cuts this process's part of a batch into one share per device, and sends each on its way.

    Args:
        batch: arrays with the examples along axis 0.
        devices: those of all processes.

    Returns:
        The shares along a new leading axis.
    """
    num_shares = len(_local(devices))
    shares = jax.tree.map(lambda x: np.reshape(x, (num_shares, -1, *np.shape(x)[1:])), batch)
    return jax.device_put(shares, _sharding(devices, jax.sharding.PartitionSpec(AXIS)))


def _local(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Picks the devices of this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def _sharding(
    devices: Sequence[jax.Device], spec: jax.sharding.PartitionSpec
) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(jax.sharding.Mesh(_local(devices), (AXIS,)), spec)
