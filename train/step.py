"""One step of training and of evaluation, and the one place where they are mapped over devices.

The bodies are written for one device's share of the batch, with the name of the axis over which the
shares lie. `jax.pmap` maps them here; `jax.shard_map` maps the same bodies to the same numbers.

A batch comes to the devices in one piece, or in several where it is too large for them. On each
device a piece goes through the network in micro-batches, one after another in a `lax.scan`
(unrolled on a CPU, where loops are slow). Whatever the pieces and the micro-batches, the gradients
travel between the devices once, when the whole batch is through.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import clars_optax
from train.data import Dataset
from train.optimizers import Optimizer
from train.state import TrainState

AXIS = "devices"

Batch = dict[str, Any]
Metrics = dict[str, Any]
EvalStep = Callable[[TrainState, Batch], Metrics]


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """How a batch goes through a device; numbers of examples on that one device.

    Attributes:
        pieces: pieces in which the batch comes.
        piece_size: examples in each.
        microbatch_size: examples that go through the network at a time; None for a whole piece.
        group_size: consecutive examples whose mean gradient has a norm; 1 for single examples.
        num_norm_examples: examples of the batch, from the first, whose norms are taken.
    """

    pieces: int
    piece_size: int
    microbatch_size: int | None = None
    group_size: int = 1
    num_norm_examples: int = 0

    def norm_examples_of(self, piece: int) -> int:
        """Counts the examples of a piece whose norms are taken."""
        return min(max(self.num_norm_examples - piece * self.piece_size, 0), self.piece_size)


class Sums(NamedTuple):
    """What a device has of a batch so far, summed over its pieces.

    Attributes:
        loss: of the mean losses.
        accuracy: of the shares of correct labels.
        batch_stats: of the running averages.
        grads: of the mean gradients.
        norms: per leaf, of the norms of the per-example gradients, over the examples.
        square_norms: per leaf, of their squares.
    """

    loss: jax.Array
    accuracy: jax.Array
    batch_stats: Any
    grads: Any
    norms: Any
    square_norms: Any


def init_state(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    transformation: optax.GradientTransformation,
    seed: int,
    devices: Sequence[jax.Device],
    ema_decay: float | None = None,
) -> TrainState:
    """Draws the initial parameters and copies the state to every device.

    Args:
        model: the network.
        image_shape: height, width and channels of an image.
        transformation: the optimizer.
        seed: the same seed gives the same parameters.
        devices: those of all processes.
        ema_decay: decay rate of the moving average of the weights; None for no average.
    """
    images = jnp.zeros((1, *image_shape))

    def init(key: jax.Array) -> TrainState:
        variables = model.init(key, images, train=False)
        return TrainState.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=transformation,
            batch_stats=variables["batch_stats"],
            ema_params=None if ema_decay is None else variables["params"],
            ema_decay=ema_decay,
        )

    # Under jit, because one compilation is faster than one for each operation.
    return replicate(jax.jit(init)(jax.random.key(seed)), devices)


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Copies arrays to every device of this process, laid out as a step returns them.

    From any other layout the second step would compile again.
    """
    return jax.device_put(tree, _sharding(devices, jax.sharding.PartitionSpec()))


class TrainBody:
    """The computation of a training step on one device.

    The model of the state must take its BatchNorm statistics over the same axis, or over none.

    Args:
        dataset: says how images are normalised.
        optimizer: the optimizer whose transformation the state holds.
        schedule: the learning rate, for the record.
        accumulation: how the batch goes through the device.
        axis_name: the axis over which the devices' shares of the batch lie.
        label_smoothing: share of the label that is spread evenly over the classes.
        seed: of the keys for dropout.
    """

    def __init__(
        self,
        dataset: Dataset,
        optimizer: Optimizer,
        schedule: optax.Schedule,
        accumulation: Accumulation,
        axis_name: str,
        *,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.accumulation = accumulation
        self._dataset = dataset
        self._optimizer = optimizer
        self._schedule = schedule
        self._axis_name = axis_name
        self._label_smoothing = label_smoothing
        self._seed = seed

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes a step with a batch that comes in one piece.

        Args:
            state: the same on every device.
            batch: this device's share.

        Returns:
            The new state and the metrics of the whole batch, the same on every device.
        """
        sums = self._of_piece(
            state, batch, jnp.zeros((), jnp.int32), self.accumulation.norm_examples_of(0)
        )
        return self.finish(state, sums)

    def accumulate(
        self, state: TrainState, sums: Sums, batch: Batch, index: jax.Array, num_norms: int
    ) -> Sums:
        """Adds a piece to the sums.

        Args:
            state: the same on every device and for all pieces.
            sums: of the pieces before; whatever they hold, the first piece replaces it.
            batch: this device's share of the piece.
            index: of the piece, from 0.
            num_norms: examples of the piece whose norms are taken.
        """
        new = self._of_piece(state, batch, index, num_norms)
        return jax.tree.map(lambda old, x: jnp.where(index == 0, x, old + x), sums, new)

    def finish(self, state: TrainState, sums: Sums) -> tuple[TrainState, Metrics]:
        """Takes the step when all pieces are through; the devices meet here and nowhere else."""
        pieces = self.accumulation.pieces
        groups = max(self.accumulation.num_norm_examples // self.accumulation.group_size, 1)
        counts = 4 * [pieces] + 2 * [groups]
        means = jax.lax.pmean(
            Sums(
                *(
                    jax.tree.map(lambda x, n=n: x / n, tree)
                    for tree, n in zip(sums, counts, strict=True)
                )
            ),
            self._axis_name,
        )
        norms = square_norms = None
        if self._optimizer.needs_norms:
            norms, square_norms = means.norms, means.square_norms
        metrics = {
            "loss": means.loss,
            "accuracy": means.accuracy,
            "learning_rate": self._schedule(state.step),
            **self._optimizer.diagnose(
                state.params, means.grads, norms, square_norms, state.opt_state
            ),
        }
        state = state.apply_gradients(
            grads=means.grads,
            batch_stats=means.batch_stats,
            example_grad_norms=norms,
            example_grad_square_norms=square_norms,
        )
        return state, metrics

    def _of_piece(self, state: TrainState, batch: Batch, index: jax.Array, num_norms: int) -> Sums:
        # Each device differentiates with respect to a copy of its own: where shard_map knows the
        # parameters to be the same everywhere, their gradient would come out summed.
        params = jax.lax.pcast(state.params, self._axis_name, to="varying")
        key = jax.random.key(self._seed)
        for number in (state.step, index, jax.lax.axis_index(self._axis_name)):
            key = jax.random.fold_in(key, number)
        (loss, aux), grads, norms = clars_optax.value_and_grad_and_norms(
            self._loss,
            has_aux=True,
            batch_argnums=2,
            rng_argnums=3,
            group_size=self.accumulation.group_size,
            num_norm_examples=num_norms,
            microbatch_size=self.accumulation.microbatch_size,
        )(params, state, batch, key)
        return Sums(
            loss,
            aux["accuracy"],
            aux["batch_stats"],
            grads,
            jax.tree.map(jnp.sum, norms),
            jax.tree.map(lambda norm: jnp.sum(jnp.square(norm)), norms),
        )

    def _loss(
        self, params: Any, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        logits, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            _normalise(batch["image"], self._dataset),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        logits = logits.astype(jnp.float32)
        labels = jax.nn.one_hot(batch["label"], logits.shape[-1])
        losses = optax.softmax_cross_entropy(
            logits, optax.smooth_labels(labels, self._label_smoothing)
        )
        accuracy = jnp.mean(_correct(logits, batch["label"]))
        return jnp.mean(losses), {"accuracy": accuracy, "batch_stats": updated["batch_stats"]}


def make_eval_body(dataset: Dataset, axis_name: str) -> EvalStep:
    """Makes the body of an evaluation step.

    Returns:
        A function of the state and one device's share of the batch, with a "mask" that is 0 for
        examples that only fill it up. It returns sums over the whole batch of "loss", "correct" and
        "examples".
    """

    def body(state: TrainState, batch: Batch) -> Metrics:
        logits = state.apply_fn(
            {"params": state.eval_params, "batch_stats": state.batch_stats},
            _normalise(batch["image"], dataset),
            train=False,
        ).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        sums = {
            "loss": jnp.sum(losses * batch["mask"]),
            "correct": jnp.sum(_correct(logits, batch["label"]) * batch["mask"]),
            "examples": jnp.sum(batch["mask"]),
        }
        return jax.lax.psum(sums, axis_name)

    return body


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


def pmap_eval_step(body: EvalStep, devices: Sequence[jax.Device]) -> EvalStep:
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


def _normalise(images: jax.Array, dataset: Dataset) -> jax.Array:
    # On the device, so that a quarter of the bytes travel to it.
    return (images.astype(jnp.float32) - jnp.asarray(dataset.mean)) / jnp.asarray(dataset.std)


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
