"""What is compiled to train: for a single run, or for many side by side.

A step is made of micro-batches, whose gradients and norms are added up as `train.body` does it for
one device. The learning rate is an argument, so that a program serves a whole grid; those that
differentiate serve every batch size, and every optimizer that wants the same norms.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import clars_optax
from benchmarks.convergence.problem import augment
from benchmarks.convergence.study import Contender
from train.body import Accumulation, normalise
from train.data import fashion_mnist
from train.optimizers import Optimizer


class State(NamedTuple):
    """What a step changes."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Sums(NamedTuple):
    """Of the micro-batches of a step so far; of norms, over their groups of examples, too."""

    loss: jax.Array
    batch_stats: Any
    grads: Any
    norms: Any
    square_norms: Any


def side_by_side(
    function: Callable[..., Any], in_axes: tuple[int | None, ...], donate_argnums: Any = ()
) -> Callable[..., Any]:
    """Compiles a function of one run for the runs along axis 0 of its arguments and results.

    Args:
        function: of one run.
        in_axes: 0 for arguments of the runs, None for those that they share.
        donate_argnums: arguments that are used up.
    """

    def mapped(*args: Any) -> Any:
        (num_runs,) = {
            len(leaf)
            for arg, axis in zip(args, in_axes, strict=True)
            if axis == 0
            for leaf in jax.tree.leaves(arg)
        }
        if num_runs > 1:
            return jax.vmap(function, in_axes)(*args)
        # An axis of length 1 would be mapped as well, and make grouped convolutions of all, which
        # are slow on a CPU.
        single = [
            arg if axis is None else jax.tree.map(lambda x: x[0], arg)
            for arg, axis in zip(args, in_axes, strict=True)
        ]
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), function(*single))

    return jax.jit(mapped, donate_argnums=donate_argnums)


class NetworkPrograms:
    """What does not depend on the optimizer.

    Args:
        network: the network.

    Attributes:
        evaluate: takes the states of runs, pixels and labels, and returns for each run the sum of
            the losses and the number of correct labels.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._gradients: dict[tuple[int, int], Callable[..., Sums]] = {}
        self.evaluate = side_by_side(self._evaluation, (0, None, None))

    def gradient(self, group_size: int, num_norms: int) -> Callable[..., Sums]:
        """Returns the program that adds a micro-batch to the sums.

        Args:
            group_size: examples per norm.
            num_norms: examples of the micro-batch, from the first, whose norms are taken.

        Returns:
            A function of states and sums of runs, pixels and labels of the training images, the
            micro-batches' indices and the seeds of runs, and the number of the micro-batch.
        """
        kind = (group_size, num_norms)
        if kind not in self._gradients:
            self._gradients[kind] = side_by_side(
                functools.partial(self._add, *kind), (0, 0, None, None, 0, 0, None), 1
            )
        return self._gradients[kind]

    def init(self, seed: jax.Array, image_shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Draws weights and running averages."""
        image = jnp.zeros((1, *image_shape))
        variables = self._network.init(jax.random.key(seed), image, train=False)
        return variables["params"], variables.get("batch_stats", {})

    def _add(
        self,
        group_size: int,
        num_norms: int,
        state: State,
        sums: Sums,
        pixels: jax.Array,
        labels: jax.Array,
        indices: jax.Array,
        seed: jax.Array,
        number: jax.Array,
    ) -> Sums:
        key = jax.random.fold_in(jax.random.key(seed), number)
        (loss, batch_stats), grads, norms = clars_optax.value_and_grad_and_norms(
            self._loss,
            has_aux=True,
            batch_argnums=(2, 3),
            group_size=group_size,
            num_norm_examples=num_norms,
        )(state.params, state.batch_stats, augment(pixels[indices], key), labels[indices])
        new = Sums(
            loss,
            batch_stats,
            grads,
            jax.tree.map(jnp.sum, norms),
            jax.tree.map(lambda norm: jnp.sum(jnp.square(norm)), norms),
        )
        return jax.tree.map(jnp.add, sums, new)

    def _loss(
        self, params: Any, batch_stats: Any, pixels: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Any]:
        logits, updated = self._network.apply(
            {"params": params, "batch_stats": batch_stats},
            normalise(pixels, fashion_mnist.DATASET),
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), updated.get("batch_stats", {})

    def _evaluation(
        self, state: State, pixels: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits: Any = self._network.apply(
            {"params": state.params, "batch_stats": state.batch_stats},
            normalise(pixels, fashion_mnist.DATASET),
            train=False,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses), jnp.sum(jnp.argmax(logits, axis=-1) == labels)


class OptimizerPrograms:
    """What depends on the optimizer and its batch size.

    Args:
        network: the network's programs.
        image_shape: height, width and channels.
        contender: the optimizer.
        batch_size: images per step.
        microbatch_size: images of a micro-batch.
        num_steps: steps of a run.

    Attributes:
        accumulation: how a batch is cut up.
        init: takes the seeds of runs, and returns their states and empty sums.
        finish: takes states, sums and learning rates of runs, and returns new states and empty
            sums.
    """

    def __init__(
        self,
        network: NetworkPrograms,
        image_shape: tuple[int, ...],
        contender: Contender,
        *,
        batch_size: int,
        microbatch_size: int,
        num_steps: int,
    ) -> None:
        self._network = network
        self._image_shape = image_shape
        self._make = functools.partial(
            contender.make,
            batch_size=batch_size,
            group_size=contender.group_size,
            num_steps=num_steps,
        )
        wanted = min(contender.num_norm_examples or batch_size, batch_size)
        self.accumulation = Accumulation(
            pieces=batch_size // microbatch_size,
            piece_size=microbatch_size,
            group_size=contender.group_size,
            num_norm_examples=wanted if self._optimizer(0.0).needs_norms else 0,
        )
        self.init = side_by_side(self._init, (0,))
        self.finish = side_by_side(self._finish, (0, 0, 0), (0, 1))

    def _optimizer(self, rate: ArrayLike) -> Optimizer:
        return self._make(lambda _: rate)

    def _init(self, seed: jax.Array) -> tuple[State, Sums]:
        params, batch_stats = self._network.init(seed, self._image_shape)
        opt_state = self._optimizer(0.0).transformation.init(params)
        of_leaves = jax.tree.map(lambda _: jnp.zeros(()), params)
        empty_stats, no_grads = jax.tree.map(jnp.zeros_like, (batch_stats, params))
        sums = Sums(jnp.zeros(()), empty_stats, no_grads, of_leaves, of_leaves)
        return State(params, batch_stats, opt_state), sums

    def _finish(self, state: State, sums: Sums, rate: jax.Array) -> tuple[State, Sums]:
        groups = max(self.accumulation.num_norm_examples // self.accumulation.group_size, 1)

        def mean(tree: Any, count: int) -> Any:
            return jax.tree.map(lambda x: x / count, tree)

        updates, opt_state = self._optimizer(rate).transformation.update(
            mean(sums.grads, self.accumulation.pieces),
            state.opt_state,
            state.params,
            example_grad_norms=mean(sums.norms, groups),
            example_grad_square_norms=mean(sums.square_norms, groups),
        )
        new = State(
            optax.apply_updates(state.params, updates),
            mean(sums.batch_stats, self.accumulation.pieces),
            opt_state,
        )
        return new, jax.tree.map(jnp.zeros_like, sums)
