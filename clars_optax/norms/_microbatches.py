"""One micro-batch after another, with the results of the whole batch."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Result(NamedTuple):
    """What a batch gives: leaves in flat lists."""

    value: jax.Array
    aux: list[Any]
    grads: list[jax.Array]
    norms: list[jax.Array]


OneBatch = Callable[[Sequence[Any], Sequence[Any], int], Result]
"""Random keys, batch, and number of examples with norms -> result."""


def accumulate(
    one_batch: OneBatch,
    aux_axes: Sequence[int | None],
    keys: Sequence[Any],
    batch: Sequence[Any],
    *,
    num_norms: int,
    microbatch_size: int,
    is_mean: bool,
) -> Result:
    """Runs the micro-batches in order and puts their results together.

    Args:
      one_batch: What to do with a micro-batch.
      aux_axes: The axis of each auxiliary leaf that carries the batch; None where it is to be
        averaged.
      keys: Trees of random keys; each key is folded with the micro-batch's index.
      batch: The leaves of the whole batch.
      num_norms: Of how many examples, from the first, norms are asked for.
      microbatch_size: How many examples a micro-batch has.
      is_mean: Whether the loss is a mean over the examples.
    """
    count = batch[0].shape[0] // microbatch_size
    norm_counts = [
        min(max(num_norms - index * microbatch_size, 0), microbatch_size) for index in range(count)
    ]

    def micro(index: Any, num_norms: int, batch: Sequence[Any]) -> tuple[Any, Any]:
        part = [
            jax.lax.dynamic_slice_in_dim(x, index * microbatch_size, microbatch_size) for x in batch
        ]
        folded = [jax.tree.map(lambda key: jax.random.fold_in(key, index), tree) for tree in keys]
        result = one_batch(folded, part, num_norms)
        averaged = [x for x, axis in zip(result.aux, aux_axes, strict=True) if axis is None]
        collected = [x for x, axis in zip(result.aux, aux_axes, strict=True) if axis is not None]
        # Many small addends: low-precision leaves are added up in float32.
        summed = jax.tree.map(
            lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)),
            (result.value, averaged, result.grads),
        )
        return summed, (collected, result.norms)

    sums: Any = None
    pieces: list[Any] = []
    for num_norms_each, run in itertools.groupby(range(count), key=norm_counts.__getitem__):
        indices = list(run)
        if jax.default_backend() == "cpu":
            # In a loop, XLA's CPU backend computes the gradients of convolutions many times slower.
            for index in indices:
                # In order: the activations of one micro-batch at a time. The index too: XLA gets
                # gradients of embeddings wrong if it cuts a sharded batch at a place that it knows.
                sums, ready, place = jax.lax.optimization_barrier(
                    (sums, list(batch), jnp.int32(index))
                )
                summed, piece = micro(place, num_norms_each, ready)
                sums = summed if sums is None else jax.tree.map(jnp.add, sums, summed)
                pieces.append(piece)
            continue
        if sums is None:
            # Only the types are used, so that the compiler drops the computation.
            sums = jax.tree.map(jnp.zeros_like, micro(0, num_norms_each, batch)[0])

        def body(sums: Any, index: jax.Array, num_norms: int = num_norms_each) -> tuple[Any, Any]:
            summed, piece = micro(index, num_norms, batch)
            return jax.tree.map(jnp.add, sums, summed), piece

        sums, stacked = jax.lax.scan(body, sums, jnp.arange(indices[0], indices[-1] + 1))
        collected, norms = stacked
        axes = [axis for axis in aux_axes if axis is not None]
        joined = [_join(x, axis) for x, axis in zip(collected, axes, strict=True)]
        pieces.append((joined, [_join(x, 0) for x in norms]))

    value, averaged, grads = sums
    if is_mean:
        value, grads = value / count, [x / count for x in grads]
    dtypes = jax.eval_shape(lambda: one_batch(keys, [x[:microbatch_size] for x in batch], 0))
    rest = iter([x / count for x in averaged])
    gathered = iter(zip(*(collected for collected, _ in pieces), strict=True))
    aux = [
        next(rest) if axis is None else jnp.concatenate(next(gathered), axis) for axis in aux_axes
    ]
    value, aux, grads = jax.tree.map(
        lambda x, like: x.astype(like.dtype), (value, aux, grads), tuple(dtypes)[:3]
    )
    norms = [jnp.concatenate(leaf) for leaf in zip(*(norms for _, norms in pieces), strict=True)]
    return Result(value, aux, grads, norms)


def _join(stacked: jax.Array, axis: int) -> jax.Array:
    """Concatenates what is stacked on the first axis along an axis of its items."""
    moved = jnp.moveaxis(stacked, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def find_aux_axes(
    paths: Sequence[str], single: Sequence[Any], doubled: Sequence[Any], microbatch_size: int
) -> list[int | None]:
    """Which axis of each auxiliary leaf carries the batch, from its types at two batch sizes.

    Raises:
      ValueError: the results of micro-batches cannot be put together.
    """
    axes: list[int | None] = []
    for path, one, two in zip(paths, single, doubled, strict=True):
        changed = (
            [i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
            if len(one.shape) == len(two.shape)
            else None
        )
        if changed == [] and jnp.issubdtype(one.dtype, jnp.floating):
            axes.append(None)
        elif changed and len(changed) == 1 and one.shape[changed[0]] == microbatch_size:
            axes.append(changed[0])
        else:
            raise ValueError(
                f"The auxiliary output {path} ({one.dtype}{list(one.shape)}) cannot be put "
                "together from micro-batches: it must have one axis that is the batch (then it is "
                "concatenated), or be floating-point and of a size that does not depend on the "
                "batch (then it is averaged)."
            )
    return axes
