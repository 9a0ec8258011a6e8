"""The ways to a value, a gradient and norms that are compared."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import clars_optax

Step = Callable[..., Any]
"""Of `(params, *batch)`: `(value, grads)` or `(value, grads, norms)`."""


def plain(loss_fn: Step, num_args: int, batch_size: int) -> Step:
    """`jax.value_and_grad`: no norms."""
    return jax.value_and_grad(loss_fn)


def plain_accumulated(loss_fn: Step, num_args: int, batch_size: int) -> Step:
    """`jax.value_and_grad` of a quarter of the batch at a time: no norms."""
    count = 4
    value_and_grad = jax.value_and_grad(loss_fn)

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, part), None

    def step(params: Any, *batch: Any) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        if jax.default_backend() == "cpu":
            # As ours does it: in a loop, XLA's CPU backend computes the gradients of convolutions
            # many times slower.
            sums = None
            for index in range(count):
                sums, ready = jax.lax.optimization_barrier((sums, parts))
                result = value_and_grad(params, *(x[index] for x in ready))
                sums = result if sums is None else jax.tree.map(jnp.add, sums, result)
        else:
            zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
            sums, _ = jax.lax.scan(
                lambda sums, part: add(sums, value_and_grad(params, *part)), zeros, parts
            )
        return jax.tree.map(lambda x: x / count, sums)

    return step


def ours(**options: Callable[[int], Any]) -> Callable[[Step, int, int], Step]:
    """`clars_optax.value_and_grad_and_norms`, with options that depend on the batch size."""

    def make(loss_fn: Step, num_args: int, batch_size: int) -> Step:
        return clars_optax.value_and_grad_and_norms(
            loss_fn,
            batch_argnums=tuple(range(1, num_args)),
            **{name: option(batch_size) for name, option in options.items()},
        )

    return make


def vmap_grad(loss_fn: Step, num_args: int, batch_size: int) -> Step:
    """`jax.vmap` of `jax.value_and_grad` of batches of one, norms and means of its results."""

    def one(params: Any, *example: Any) -> Any:
        return jax.value_and_grad(loss_fn)(params, *(x[None] for x in example))

    def step(params: Any, *batch: Any) -> Any:
        in_axes = (None, *[0] * (num_args - 1))
        values, grads = jax.vmap(one, in_axes)(params, *batch)
        norms = jax.vmap(_norms)(grads)
        return jnp.mean(values), jax.tree.map(lambda x: jnp.mean(x, axis=0), grads), norms

    return step


def micro_grad(loss_fn: Step, num_args: int, batch_size: int) -> Step:
    """`optax.microbatching.micro_grad` with norms as its metrics."""
    per_example = optax.microbatching.micro_grad(
        loss_fn,
        batch_argnums=tuple(range(1, num_args)),
        accumulator=optax.microbatching.AccumulationType.MEAN,
        metrics_fn=_norms,
    )

    def step(params: Any, *batch: Any) -> Any:
        grads, individual = per_example(params, *batch)
        return jnp.mean(individual.values), grads, individual.metrics

    return step


def _norms(grads: Any) -> Any:
    return jax.tree.map(lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)))), grads)


VARIANTS: dict[str, Callable[[Step, int, int], Step]] = {
    "A/A": plain,
    "exact": ours(),
    "group_size=8": ours(group_size=lambda n: 8),
    "num_norm_examples=N/16": ours(num_norm_examples=lambda n: max(1, n // 16)),
    "microbatch_size=N/4": ours(microbatch_size=lambda n: n // 4),
    "plain, N/4 at a time": plain_accumulated,
    'method="generic"': ours(method=lambda n: "generic"),
    "vmap(grad)": vmap_grad,
    "micro_grad": micro_grad,
}
