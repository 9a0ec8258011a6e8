"""Traces the loss: at the batch size, at twice that, and where need be at the size of a group."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from clars_optax.norms._arguments import is_key
from clars_optax.norms._batch_axes import follow
from clars_optax.norms._layout import leading
from clars_optax.norms._match import match
from clars_optax.norms._obstacles import Obstacle
from clars_optax.norms._plan import Plan
from clars_optax.norms._program import Operation, Program, closed
from clars_optax.norms._rows import Rows
from clars_optax.norms._scope import Scope
from clars_optax.norms._separate import has_same_numbers

Loss = Callable[..., tuple[Any, list[Any]]]
"""Parameters, batch -> loss, auxiliary leaves."""


def resized(batch: Sequence[Any], num_examples: int) -> list[Any]:
    """The types of a batch with another number of examples."""

    def resize(x: Any) -> Any:
        copies = -(-num_examples // x.shape[0])
        return (
            jax.lax.concatenate([x] * copies, 0)[:num_examples] if copies > 1 else x[:num_examples]
        )

    # As `jax.eval_shape`, but that the types say over which axes of a mesh they vary.
    return [jax.make_jaxpr(resize)(x).out_avals[0] for x in batch]


def make_plan(
    loss_fn: Loss,
    params: Sequence[Any],
    paths: Sequence[str],
    batch: Sequence[Any],
    *,
    with_rules: bool,
) -> Plan:
    """Finds the batch in every value of the loss, and what to do with each operation.

    Raises:
      NotImplementedError, ValueError: as `value_and_grad_and_norms`.
    """
    num_examples = batch[0].shape[0]
    program = _trace(loss_fn, params, batch)
    for operation in program.operations:
        if operation.writes_params:
            raise NotImplementedError(
                f"No per-example gradient norms: in {operation.where} something that depends on "
                "parameters is written to a mutable array, as jax.new_ref makes them, in which it "
                "is not followed. Return it instead, or write its jax.lax.stop_gradient."
            )
    with explained(num_examples, 2 * num_examples):
        doubled = _trace(loss_fn, params, resized(batch, 2 * num_examples))
    inputs = program.inputs
    layouts, pairs = follow(
        program,
        doubled,
        {value: leading(value.shape) for value in inputs[len(params) :]},
        num_examples,
    )
    return Plan.of_loss(
        program,
        Scope(layouts, pairs, num_examples, with_rules),
        dict(zip(inputs[: len(params)], paths, strict=True)),
    )


@contextmanager
def explained(
    num_examples: int, other: int, attempt: Callable[[int], object] | None = None
) -> Iterator[None]:
    """Says why a loss that works with the batch is run with another number of examples.

    Args:
      num_examples: in the batch.
      other: the other number.
      attempt: runs the loss with so many, where it is not known yet to work with the batch. What it
        raises then is no matter of the number.

    Raises:
      ValueError: in the place of what is raised inside.
    """
    try:
        yield
    except Exception as error:
        if attempt is not None:
            attempt(num_examples)
        raise ValueError(
            f"loss_fn works with the batch of {num_examples} examples, but not with {other}, "
            "which the norms and micro-batches need. It probably closes over arrays or numbers "
            "that depend on the batch size: pass the arrays in arguments of their own, named in "
            "batch_argnums, and take sizes from the arrays' shapes. Of these, the first axis alone "
            "is the batch: what has it on two, as the distances of all examples, make inside. The "
            "error was: "
            f"{_first_line(error)}"
        ) from error


def _trace(loss_fn: Loss, params: Sequence[Any], batch: Sequence[Any]) -> Program:
    def flat(params: Sequence[Any], batch: Sequence[Any]) -> list[Any]:
        value, aux = loss_fn(params, batch)
        return [value, *aux]

    return Program.of_loss(jax.make_jaxpr(flat)(list(params), batch), len(params))


def refuse_shared_keys(loss: ClosedJaxpr) -> None:
    """Refuses random keys that a loss closes over: all micro-batches would share them.

    Raises:
      ValueError: as said.
    """
    key = next(filter(is_key, _constants(loss)), None)
    if key is not None:
        raise ValueError(
            f"loss_fn closes over a random key, or what looks like one, {key.dtype}"
            f"{list(key.shape)}: with microbatch_size, all micro-batches would draw the same "
            "numbers from it. Pass it in an argument of its own and name that in rng_argnums: every"
            " micro-batch then gets a key of its own. What all examples are to share, draw before "
            "the call. Convert what is no key to int32."
        )


def _constants(function: ClosedJaxpr) -> Iterator[Any]:
    """What a function's results come from of what it closes over, and the functions in it."""
    jaxpr = function.jaxpr
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars):
            continue
        needed.update(atom for atom in equation.invars if not isinstance(atom, Literal))
        for body in jax.tree.leaves(list(equation.params.values())):
            if isinstance(body, ClosedJaxpr | Jaxpr):
                yield from _constants(closed(body))
    for variable, constant in zip(jaxpr.constvars, function.consts, strict=True):
        if variable in needed:
            yield constant


def _first_line(error: Exception) -> str:
    line, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {line}"


def trace_groups(
    plan: Plan, loss_fn: Loss, params: Sequence[Any], batch: Sequence[Any], rows: Rows
) -> None:
    """Completes a plan by what functions with derivatives of their own do with a group.

    Raises:
      NotImplementedError: the loss of a group differs from the loss of the batch.
    """
    untraced = plan.untraced
    if not untraced:
        return
    size = 1 if rows.by_example else rows.group_size
    if size == rows.num_examples:
        plan.scope.twins.update(zip(untraced, untraced, strict=True))
        return

    def refusal(operation: Operation, reason: str) -> Exception:
        obstacle = Obstacle(
            NotImplementedError,
            "the parameter meets the batch in a function with a derivative of its own, for which "
            f"the loss is traced with {size} example(s); {reason}. Make the loss work alike for "
            "every batch size, or apply the parameter outside of the function.",
        )
        return obstacle.error(operation, untraced[operation])

    try:
        small = _trace(loss_fn, params, resized(batch, size))
    except Exception as error:
        raise refusal(next(iter(untraced)), f"that failed: {_first_line(error)}") from error
    pairs = match(plan.program, small)
    for operation in untraced:
        twin = pairs[operation.outputs[0]].producer if operation.outputs[0] in pairs else None
        shapes = [plan.scope.layouts[value].local_shape(size) for value in operation.operands]
        if (
            twin is None
            or [value.shape for value in twin.operands] != shapes
            or not has_same_numbers(operation, twin)
        ):
            raise refusal(operation, "it is another computation then")
        plan.scope.twins[operation] = twin
