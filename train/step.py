"""One step of training and of evaluation, and the one place where they are mapped over devices.

A body is written for one device's share of the batch, with the name of the axis over which the
shares lie. `jax.pmap` maps it here; `jax.shard_map` maps the same body to the same numbers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

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
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], Metrics]


@dataclasses.dataclass(frozen=True)
class Norms:
    """How the per-example gradient norms are taken; numbers of examples on one device.

    Attributes:
        group_size: consecutive examples that count as one.
        num_examples: examples whose norms are taken; None for all.
        microbatch_size: examples that go through the network at a time; None for all.
    """

    group_size: int = 1
    num_examples: int | None = None
    microbatch_size: int | None = None


def init_state(
    model: nn.Module,
    dataset: Dataset,
    transformation: optax.GradientTransformation,
    seed: int,
    devices: Sequence[jax.Device],
) -> TrainState:
    """Draws the initial parameters and copies the state to every device."""
    images = jnp.zeros((1, *dataset.image_shape))
    # Under jit, because one compilation is faster than one for each operation.
    variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(seed), images)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=transformation,
        batch_stats=variables["batch_stats"],
    )
    # Laid out as a step returns it: from any other layout the second step compiles again.
    mesh = jax.sharding.Mesh(devices, (AXIS,))
    return jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def make_train_body(
    dataset: Dataset,
    optimizer: Optimizer,
    schedule: optax.Schedule,
    norms: Norms,
    axis_name: str,
) -> TrainStep:
    """Makes the body of a training step.

    The model of the state must take its BatchNorm statistics over the same axis.

    Args:
        dataset: says how images are normalised.
        optimizer: the optimizer whose transformation the state holds.
        schedule: the learning rate, for the record.
        norms: how the per-example norms are taken.
        axis_name: the axis over which the devices' shares of the batch lie.

    Returns:
        A function of the state and one device's share of the batch. It returns the new state and
        the metrics of the whole batch, the same on every device.
    """

    def loss_fn(params: Any, state: TrainState, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        logits, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            _normalise(batch["image"], dataset),
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        accuracy = jnp.mean(_correct(logits, batch["label"]))
        return jnp.mean(losses), {"accuracy": accuracy, "batch_stats": updated["batch_stats"]}

    def body(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Each device differentiates with respect to a copy of its own: where shard_map knows the
        # parameters to be the same everywhere, their gradient would come out summed.
        params = jax.lax.pcast(state.params, axis_name, to="varying")
        (loss, aux), grads, example_norms = _value_and_grad(loss_fn, optimizer, norms)(
            params, state, batch
        )
        grads = jax.lax.pmean(grads, axis_name)
        metrics = {
            "loss": jax.lax.pmean(loss, axis_name),
            "accuracy": jax.lax.pmean(aux["accuracy"], axis_name),
            "learning_rate": schedule(state.step),
            **optimizer.diagnose(state.params, grads, example_norms, axis_name),
        }
        mean_norms = jax.lax.pmean(jax.tree.map(jnp.mean, example_norms), axis_name)
        state = state.apply_gradients(
            grads=grads, example_grad_norms=mean_norms, batch_stats=aux["batch_stats"]
        )
        return state, metrics

    return body


def make_eval_body(dataset: Dataset, axis_name: str) -> EvalStep:
    """Makes the body of an evaluation step.

    Returns:
        A function of the state and one device's share of the batch, with a "mask" that is 0 for
        examples that only fill it up. It returns sums over the whole batch of "loss", "correct" and
        "examples".
    """

    def body(state: TrainState, batch: Batch) -> Metrics:
        logits = state.apply_fn(
            {"params": state.params, "batch_stats": state.batch_stats},
            _normalise(batch["image"], dataset),
            train=False,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        sums = {
            "loss": jnp.sum(losses * batch["mask"]),
            "correct": jnp.sum(_correct(logits, batch["label"]) * batch["mask"]),
            "examples": jnp.sum(batch["mask"]),
        }
        return jax.lax.psum(sums, axis_name)

    return body


def pmap_train_step(body: TrainStep, devices: Sequence[jax.Device]) -> TrainStep:
    """Maps a training body over the devices; the state that goes in is used up."""
    return jax.pmap(
        body,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=0,
    )


def pmap_eval_step(body: EvalStep, devices: Sequence[jax.Device]) -> EvalStep:
    """Maps an evaluation body over the devices."""
    return jax.pmap(body, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices)


def shard(batch: Batch, num_devices: int) -> Batch:
    """Cuts a batch into one share per device, on a new leading axis."""
    return jax.tree.map(lambda x: np.reshape(x, (num_devices, -1, *np.shape(x)[1:])), batch)


def _value_and_grad(loss_fn: Callable[..., Any], optimizer: Optimizer, norms: Norms) -> Any:
    """Differentiates `loss_fn(params, state, batch)`; norms are None where nobody needs them."""
    if not optimizer.needs_norms:
        if norms.microbatch_size is None:

            def plain(params: Any, state: TrainState, batch: Batch) -> Any:
                value, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, batch)
                return value, grads, None

            return plain
        # The fewest norms that can be had: of one micro-batch's gradient.
        size = norms.microbatch_size
        norms = Norms(group_size=size, num_examples=size, microbatch_size=size)
    return clars_optax.value_and_grad_and_norms(
        loss_fn,
        has_aux=True,
        batch_argnums=2,
        group_size=norms.group_size,
        num_norm_examples=norms.num_examples,
        microbatch_size=norms.microbatch_size,
    )


def _normalise(images: jax.Array, dataset: Dataset) -> jax.Array:
    # On the device, so that a quarter of the bytes travel to it.
    return (images.astype(jnp.float32) - jnp.asarray(dataset.mean)) / jnp.asarray(dataset.std)


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
