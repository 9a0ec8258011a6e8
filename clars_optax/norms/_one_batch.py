"""The gradients and norms of one batch, or of one micro-batch: plan, taps, one backward pass."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._arguments import Settings
from clars_optax.norms._interpreter import run
from clars_optax.norms._microbatches import Result
from clars_optax.norms._nested import Entry
from clars_optax.norms._plan import Plan
from clars_optax.norms._rows import Rows
from clars_optax.norms._rules import platform
from clars_optax.norms._taps import differentiated_once
from clars_optax.norms._trace import Loss, make_plan, trace_groups
from clars_optax.norms._trials import try_kernels


def one_batch(
    loss_fn: Loss,
    params: Sequence[Any],
    paths: Sequence[str],
    batch: Sequence[Any],
    num_norms: int,
    settings: Settings,
) -> Result:
    """Differentiates a loss, once for its gradients and the norms of the first examples.

    Raises:
      NotImplementedError, ValueError: as `value_and_grad_and_norms`.
    """
    num_examples = batch[0].shape[0]
    if num_norms == 0 or num_examples == 1 or not params:
        (value, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(list(params), batch)
        norms = [jnp.linalg.norm(g.astype(jnp.float32).ravel())[None] for g in grads]
        return Result(value, aux, grads, [norm[:num_norms] for norm in norms])

    plan = make_plan(loss_fn, params, paths, batch, with_rules=settings.method == "auto")
    if settings.method == "auto" and _makes_all(plan, params, paths, num_examples):
        num_made = num_examples
    else:
        num_made = num_norms
    rows = Rows(
        num_examples,
        settings.group_size,
        num_made,
        is_mean=settings.loss_reduction == "mean",
        by_example=plan.is_split,
    )
    trace_groups(plan, loss_fn, params, batch, rows)
    try_kernels(plan, rows)
    fanned_out = plan.fanned_out
    params = [
        differentiated_once(param, path) if path in fanned_out else param
        for param, path in zip(params, paths, strict=True)
    ]

    def tapped(params: Sequence[Any], taps: Sequence[Any]) -> tuple[Any, list[Any]]:
        entries = [Entry(x, tap=tap) for x, tap in zip(params, taps, strict=True)]
        value, *aux = run(plan, [*entries, *map(Entry, batch)], rows)
        return value.value, [x.value for x in aux]

    # Made from the parameters, a tap varies over the same mapped axes as they do.
    taps = [
        jnp.broadcast_to(jnp.sum(jnp.zeros_like(p), dtype=jnp.float32), (rows.num_groups,))
        for p in params
    ]
    (value, aux), (grads, squares) = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)(
        list(params), taps
    )
    num_groups = num_norms // settings.group_size
    return Result(value, aux, grads, [jnp.sqrt(square[:num_groups]) for square in squares])


def _makes_all(plan: Plan, params: Sequence[Any], paths: Sequence[str], num_examples: int) -> bool:
    """Whether to make the norms of all examples, even if only those of some are wanted.

    A kernel finds them in the pass that makes the gradient, and a pass over some examples would
    come on top; a TPU copies what it takes some of. Not where the rows of parameters that no rule
    takes would fill the memory.
    """
    device = platform()
    if not device.makes_all:
        return False
    fanned_out = plan.fanned_out
    sizes = [param.size for param, path in zip(params, paths, strict=True) if path in fanned_out]
    return 4 * num_examples * sum(sizes) <= device.chunk_bytes


def check_sum_of_microbatches(
    loss_fn: Loss, params: Sequence[Any], paths: Sequence[str], batch: Sequence[Any]
) -> None:
    """Refuses a loss with a term of parameters alone.

    Raises:
      ValueError: as said.
    """
    if make_plan(loss_fn, params, paths, batch, with_rules=False).has_term_of_parameters:
        raise ValueError(
            "The loss has a term of parameters alone, which a sum over micro-batches would count "
            "once for each of them. Leave it to the optimizer (weight_decay of clars_optax.clars), "
            'or use a mean loss with loss_reduction="mean".'
        )
