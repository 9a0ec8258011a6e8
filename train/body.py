"""What one device does in a step of training and of evaluation.

The bodies are written for one device's share of the batch, with the name of the axis over which the
shares lie. Whether `jax.pmap` or `jax.shard_map` maps them over it makes no difference.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import clars_optax
from train.data import Dataset
from train.finite import finite_leaves
from train.optimizers import Optimizer
from train.schedules import advanced
from train.state import TrainState

Batch = dict[str, Any]
Metrics = dict[str, Any]
EvalBody = Callable[[TrainState, Batch], Metrics]


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

    @property
    def at_a_time(self) -> int:
        """Examples that go through the network together, and through BatchNorm."""
        return self.microbatch_size or self.piece_size

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
        """Takes the step when all pieces are through: here the devices meet, and in BatchNorm.

        Where something is not finite, nothing but the count of steps changes, which the learning
        rate goes by, and "finite" in the metrics says what it was: by the name of a tree, what
        `finite_leaves` finds of it.
        """
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
        updated = state.apply_gradients(
            grads=means.grads,
            batch_stats=means.batch_stats,
            example_grad_norms=norms,
            example_grad_square_norms=square_norms,
        )
        finite = {
            "loss": finite_leaves(means.loss),
            "gradient": finite_leaves(means.grads),
            "norms": finite_leaves(norms),
            "running averages": finite_leaves(means.batch_stats),
        }
        causes = jnp.all(jnp.concatenate(list(finite.values())))
        # That the weights follow these is not worth a word.
        finite["weights"] = finite_leaves(updated.params) | ~causes
        all_finite = causes & jnp.all(finite["weights"])
        kept = jax.tree.map(lambda new, old: jnp.where(all_finite, new, old), updated, state)
        opt_state = advanced(kept.opt_state, 1 - all_finite.astype(jnp.int32))
        kept = kept.replace(step=updated.step, opt_state=opt_state)
        return kept, {**metrics, "finite": finite}

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
            normalise(batch["image"], self._dataset),
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


def make_eval_body(dataset: Dataset, axis_name: str) -> EvalBody:
    """Makes the body of an evaluation step.

    Returns:
        A function of the state and one device's share of the batch, with a "mask" that is 0 for
        examples that only fill it up. It returns sums over the whole batch of "loss", "correct" and
        "examples".
    """

    def body(state: TrainState, batch: Batch) -> Metrics:
        logits = state.apply_fn(
            state.eval_variables,
            normalise(batch["image"], dataset),
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


def normalise(images: jax.Array, dataset: Dataset) -> jax.Array:
    """Makes what goes into the network of stored pixels: float32, of mean 0 and deviation 1."""
    # On the device, so that a quarter of the bytes travel to it.
    return (images.astype(jnp.float32) - jnp.asarray(dataset.mean)) / jnp.asarray(dataset.std)


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
