"""The custom derivatives that let per-example cotangents reach a parameter.

Imagine that every example (or group of examples) used a copy of its own of each parameter. Since
the copies are equal, the forward pass needs none of them: a value computed from parameters is kept
once, as it always was. Beside it goes its *shadow*, an array with one row per copy, which the
forward pass never reads, so that the compiler drops it. The shadow exists for its cotangent, whose
row i is the cotangent of copy i.

- `fan_out` makes the shadow of a parameter. Backward, it adds the rows up to the parameter's
  gradient and hands their squared norms to its second argument, the tap.
- `carry` runs the shadows through an operation on parameters alone.
- `meet` is the frontier: an operation in which such a value meets the batch. Backward, it forms the
  rows.
- `spread` gives a term of parameters alone that is added to the loss to every example.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rows import Rows
from clars_optax.norms._rules import Elementwise, Rule, cheapest, platform
from clars_optax.norms._rules._products import sum_of_rows
from clars_optax.norms._use import Use


def fan_out(parameter: jax.Array, tap: jax.Array, rows: Rows) -> jax.Array:
    """The shadow of a parameter; the cotangent of `tap` is the squared norms of the groups."""

    @jax.custom_vjp
    def copies(parameter: jax.Array, tap: jax.Array) -> jax.Array:
        del tap
        return jnp.broadcast_to(parameter, (rows.count, *parameter.shape))

    def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        return sum_of_rows(cotangent), rows.squared_norms(cotangent)

    copies.defvjp(lambda parameter, tap: (copies(parameter, tap), None), backward)
    return copies(parameter, tap)


def differentiated_once(parameter: jax.Array, path: str) -> jax.Array:
    """The parameter itself, for which a derivative from outside is an error.

    What is computed from a parameter with a shadow is cut off from it, so that its gradient comes
    from the shadow alone. A second derivative would silently lack all that.
    """

    @jax.custom_jvp
    def run(parameter: jax.Array) -> jax.Array:
        return parameter

    @run.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "A derivative is taken through value_and_grad_and_norms with respect to the parameter "
            f"{path}, which can be had only for parameters that are used once, in an operation "
            "that has a rule. Use jax.value_and_grad, and for norms of uncoupled examples "
            "jax.vmap(jax.grad(loss_fn)), where you differentiate twice."
        )

    return run(parameter)


def spread(value: jax.Array, shadow: jax.Array, rows: Rows) -> jax.Array:
    """A value of parameters alone, whose cotangent belongs to all examples in equal parts."""

    @jax.custom_vjp
    def run(value: jax.Array, shadow: jax.Array) -> jax.Array:
        del shadow
        return value

    def backward(_: None, cotangent: jax.Array) -> tuple[None, jax.Array]:
        shares = rows.shares().reshape(rows.count, *[1] * cotangent.ndim)
        return None, (shares * cotangent).astype(cotangent.dtype)

    run.defvjp(lambda value, shadow: (run(value, shadow), None), backward)
    return run(value, shadow)


def meet(
    use: Use,
    rule: Elementwise | None,
    shadows: Sequence[jax.Array],
    arguments: Sequence[Any],
    rows: Rows,
) -> list[Any]:
    """An operation in which values with shadows meet the batch: the operation itself, forward.

    Args:
      use: the operation.
      rule: makes the rows of a sum or a product; None where the operation's derivative does.
      shadows: those of the values.
      arguments: of the operation.
      rows: what they are of.
    """

    def forward(shadows: Sequence[jax.Array], arguments: Sequence[Any]) -> tuple[Any, Any]:
        # The bare operation: a policy of `jax.checkpoint` must know it by its name.
        del shadows
        return use.operation.apply(*arguments), arguments

    def backward(arguments: list[Any], cotangents: list[Any]) -> tuple[list[Any], list[Any]]:
        cotangents = use.differentiable(cotangents)
        active = use.pull(arguments, cotangents, use.active)
        if rule is not None:
            pulled = [use.rows_by_rule(rule, arguments, cotangents[0], rows, platform())]
        else:
            layouts = use.differentiable(use.output_layouts)
            cut = [rows.cut(x, layout) for x, layout in zip(cotangents, layouts, strict=True)]
            pulled = use.pull_rows(arguments, cut, use.shadowed, rows)
        return use.placed(pulled, active)

    run = jax.custom_vjp(lambda *args: forward(*args)[0])
    run.defvjp(forward, backward)
    return run(list(shadows), list(arguments))


def claimed(
    use: Use, rule: Rule, tap: jax.Array, arguments: Sequence[Any], rows: Rows
) -> list[Any]:
    """The only use of a parameter, with a rule: the cotangent of `tap` is the squared norms."""
    (parameter,) = use.shadowed

    def forward(tap: jax.Array, arguments: Sequence[Any]) -> tuple[Any, Any]:
        del tap
        return use.operation.apply(*arguments), arguments

    def backward(arguments: list[Any], cotangents: list[Any]) -> tuple[jax.Array, list[Any]]:
        device = platform()
        ways = use.ways(rule, arguments, cotangents[0], rows, device)
        way = cheapest(ways, device, needs_gradient=not rows.has_rest)
        squares, gradient = way.run()
        if gradient is None or rows.has_rest:
            x, g = use.for_rule(arguments, cotangents[0])
            gradient = rule.gradient(x[:, None], g[:, None])
        wanted = use.active if gradient is not None else (parameter, *use.active)
        pulled = dict(zip(wanted, use.pull(arguments, cotangents, wanted), strict=True))
        if gradient is not None:
            pulled[parameter] = gradient.astype(arguments[parameter].dtype)
        return squares, [pulled.get(i) for i in range(len(arguments))]

    run = jax.custom_vjp(lambda *args: forward(*args)[0])
    run.defvjp(forward, backward)
    return run(tap, list(arguments))


def carry(
    use: Use, shadows: Sequence[jax.Array], arguments: Sequence[Any], rows: Rows
) -> list[jax.Array]:
    """The shadows of the results of an operation that does not meet the whole batch."""

    @jax.custom_vjp
    def run(shadows: Sequence[jax.Array], arguments: Sequence[Any]) -> list[jax.Array]:
        del shadows
        outputs = use.operation.apply(*arguments)
        return [rows.copies(x, y) for x, y in zip(outputs, use.output_layouts, strict=True)]

    def backward(arguments: list[Any], cotangents: list[Any]) -> tuple[list[Any], list[Any]]:
        cotangents = use.differentiable(cotangents)
        if not any(layout.carries_batch for layout in use.layouts):
            # The map is linear and the same for all rows: their sum can be pulled back at once.
            total = [sum_of_rows(x) for x in cotangents]
            active = use.pull(arguments, total, use.active)
            pulled = use.pull_rows(arguments, [(x, None) for x in cotangents], use.shadowed, rows)
            return use.placed(pulled, active)
        wanted = (*use.shadowed, *use.active)
        pulled = use.pull_rows(arguments, [(x, None) for x in cotangents], wanted, rows)
        gathered = [
            use.gather(index, arguments[index], x, rows)
            for index, x in zip(use.active, pulled[len(use.shadowed) :], strict=True)
        ]
        return use.placed(pulled[: len(use.shadowed)], gathered)

    run.defvjp(lambda shadows, arguments: (run(shadows, arguments), arguments), backward)
    return run(list(shadows), list(arguments))
