"""The ways to a value, a gradient and norms that are compared."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import clars_optax
from benchmarks.models import Problem

Step = Callable[..., Any]
"""Of a problem's arguments: `(value, grads)` or `(value, grads, norms)`."""

Variant = Callable[[Problem], Step]

_NUM_MICROBATCHES = 4


def plain(problem: Problem) -> Step:
    """`jax.value_and_grad`, without norms: what everything is compared with."""
    return jax.value_and_grad(problem.loss_fn)


def accumulated(problem: Problem) -> Step:
    """`jax.value_and_grad` of one micro-batch after another, without norms."""

    def step(params: Any, *batch: Any) -> Any:
        def add(sums: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, plain(problem)(params, *part)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        parts = jax.tree.map(lambda x: x.reshape(_NUM_MICROBATCHES, -1, *x.shape[1:]), batch)
        # In a loop, XLA's CPU backend computes the gradients of convolutions many times slower.
        sums, _ = jax.lax.scan(add, zeros, parts, unroll=jax.default_backend() == "cpu")
        return jax.tree.map(lambda x: x / _NUM_MICROBATCHES, sums)

    return step


def ours(**options: Any) -> Variant:
    """`clars_optax.value_and_grad_and_norms`.

    Args:
        **options: its options; functions are called with the batch size.
    """

    def make(problem: Problem) -> Step:
        return clars_optax.value_and_grad_and_norms(
            problem.loss_fn,
            batch_argnums=problem.batch_argnums,
            **{
                name: option(problem.batch_size) if callable(option) else option
                for name, option in options.items()
            },
        )

    return make


def vmap_grad(problem: Problem) -> Step:
    """`jax.vmap` over the gradients of batches of one, and norms and means of what it gives."""

    def one(params: Any, *example: Any) -> Any:
        value, grads = plain(problem)(params, *(x[None] for x in example))
        return value, grads, _norms(grads)

    def step(params: Any, *batch: Any) -> Any:
        in_axes = (None, *[0] * len(batch))
        values, grads, norms = jax.vmap(one, in_axes)(params, *batch)
        return jnp.mean(values), jax.tree.map(lambda x: jnp.mean(x, axis=0), grads), norms

    return step


def micro_grad(problem: Problem) -> Step:
    """`optax.microbatching.micro_grad` with the norms as its metrics."""
    per_example = optax.microbatching.micro_grad(
        problem.loss_fn,
        batch_argnums=problem.batch_argnums,
        accumulator=optax.microbatching.AccumulationType.MEAN,
        metrics_fn=_norms,
    )

    def step(params: Any, *batch: Any) -> Any:
        grads, individual = per_example(params, *batch)
        return jnp.mean(individual.values), grads, individual.metrics

    return step


def _norms(grads: Any) -> Any:
    return jax.tree.map(lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)))), grads)


VARIANTS: dict[str, Variant] = {
    "exact": ours(),
    "group_size=8": ours(group_size=8),
    "num_norm_examples=N/16": ours(num_norm_examples=lambda n: n // 16),
    "microbatch_size=N/4": ours(microbatch_size=lambda n: n // _NUM_MICROBATCHES),
    "plain,N/4": accumulated,
    "generic": ours(method="generic"),
    "vmap": vmap_grad,
    "micro_grad": micro_grad,
}
