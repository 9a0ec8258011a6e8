"""Where a parameter can be followed, and what to say where it cannot."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from clars_optax.norms._layout import Layout
from clars_optax.norms._primitives import COLLECTIVES, ELEMENTWISE
from clars_optax.norms._program import Operation, Value

# Where examples stay apart, on the conditions in `_mixes`.
_LOCAL = ELEMENTWISE | frozenset(
    """
    broadcast_in_dim concatenate conv_general_dilated dot_general gather pad reduce_max reduce_min
    reduce_prod reduce_sum reshape squeeze stack tile transpose
    """.split()
)

LINEAR = frozenset(
    """
    add add_any broadcast_in_dim concatenate convert_element_type copy name neg pbroadcast pcast
    psum psum2 psum_invariant pvary reduce_sum reshape sharding_constraint slice squeeze stack sub
    transpose
    """.split()
)
"""Linear, whatever is constant: a sum with a term of parameters alone may pass through on its way
to the loss."""


class Obstacle(NamedTuple):
    """Why a value that comes from parameters cannot be followed through an operation."""

    kind: type[Exception]
    reason: str

    def error(self, operation: Operation, paths: frozenset[str]) -> Exception:
        """The error that names the parameters and the operation."""
        names = ", ".join(sorted(paths))
        return self.kind(
            f"No per-example gradient norms for {names}: in {operation.where} {self.reason}"
        )


EXCHANGED = Obstacle(
    NotImplementedError,
    "a parameter is exchanged between devices, which would add up the examples of all of them. "
    "Inside jax.shard_map, mark the parameters as varying before the call: params = "
    "jax.lax.pcast(params, axis_name, to='varying'), and average the gradients after it.",
)
TRACED_DIFFERENTLY = Obstacle(
    ValueError,
    "the loss is traced differently at twice the batch size. Make its computation the same for "
    "every batch size.",
)
SHARDED = Obstacle(
    NotImplementedError,
    "the parameter meets the batch inside jax.shard_map, which is not followed. Put the call of "
    "value_and_grad_and_norms inside of jax.shard_map, with the parameters marked as varying "
    "(jax.lax.pcast(params, axis_name, to='varying')), or leave the sharding to jax.jit.",
)
TWO_BATCH_AXES = Obstacle(
    ValueError,
    "the parameter meets values with two batch axes, such as the logits of all pairs of "
    "examples; it is not defined which example's copy would be used. Scale the embeddings "
    "before their product instead, or take the parameter out of argnums.",
)
UNSUPPORTED = Obstacle(
    NotImplementedError,
    "the parameter meets the batch, which is not supported for this primitive. Apply the "
    "parameter outside of it (for a solve, multiply by the inverse), or take it out of argnums.",
)
MIXED = Obstacle(
    ValueError,
    "the parameter meets the batch where examples are mixed. Apply the parameter to each "
    "example on its own.",
)
MIXED_INSIDE = Obstacle(
    NotImplementedError,
    "the parameter meets the batch inside a function with a derivative of its own, and it cannot "
    "be seen there that each example's result depends on that example alone. Apply the parameter "
    "outside of it, or take it out of argnums.",
)
SIZED_INSIDE = Obstacle(
    NotImplementedError,
    "the parameter meets the batch inside a function with a derivative of its own that holds a "
    "number which depends on the batch size. Apply the parameter outside of it, or bring that "
    "number in from outside.",
)
NOT_LINEAR = Obstacle(
    NotImplementedError,
    "the function's own derivative cannot be seen to be linear in the cotangent, as that of one "
    "which clips, normalises or adds to gradients is not; applied to each example's, it would give "
    "another sum. Change the gradients after the call instead.",
)
AFTER_THE_MEAN = Obstacle(
    ValueError,
    "the parameter meets a value that is reduced over the batch, other than by addition, or that "
    "is of some fixed examples of it, as `x[0]` is, so that it has no per-example gradient. Apply "
    "it to each example before the mean; a term of the loss, add with `+` at the end; cut the "
    "batch before the call.",
)
A_FIXED_PART = Obstacle(
    ValueError,
    "the parameter meets a fixed part of the batch, as `x[0]` is: it is not defined whether the "
    "copies of those examples would be used, or those of all. Apply it to the whole batch, and "
    "take the part of the result; what all examples share, pass in an argument outside of "
    "batch_argnums.",
)
ONE_FOR_ALL = Obstacle(
    NotImplementedError,
    "the parameter meets the batch inside a function with a derivative of its own, of which one "
    "result is for each example, and another is not. Return them from two functions.",
)
OVER_THE_BATCH = Obstacle(
    NotImplementedError,
    "the parameter meets a loop whose steps are the examples. Use jax.vmap over the examples, or "
    "jax.lax.map without batch_size, and reduce what it returns.",
)


def not_followed(problem: str) -> Obstacle:
    """Why a layout is not known."""
    return Obstacle(
        NotImplementedError,
        f"the parameter meets values in which the batch cannot be followed ({problem}). Apply "
        "the parameter where one axis is the batch.",
    )


def find_obstacle(
    operation: Operation, layouts: Mapping[Value, Layout], pairs: Mapping[Value, Value]
) -> Obstacle | None:
    """Checks an operation that a value from parameters enters."""
    operands = [layouts[value] for value in operation.operands]
    every = [*operands, *(layouts[value] for value in operation.outputs)]
    if operation.name in COLLECTIVES:
        return EXCHANGED
    if any(v.from_params and v not in pairs for v in (*operation.operands, *operation.outputs)):
        return TRACED_DIFFERENTLY
    meets_part = any(layouts[x].is_part and x.from_batch for x in operation.operands)
    if not any(layout.carries_batch for layout in every):
        return A_FIXED_PART if meets_part else None
    if operation.name == "scan":
        # One whose steps are not the examples is a nested program.
        return None if _is_map(operation, operands) else OVER_THE_BATCH
    problem = next((layout.problem for layout in every if layout.problem is not None), None)
    if problem is not None:
        return not_followed(problem)
    if any(layout.is_crossed for layout in every):
        return TWO_BATCH_AXES
    if operation.name == "custom_vjp_call":
        if meets_part:
            return A_FIXED_PART
        # Whether it mixes examples is for `_separate` to say.
        return None
    if operation.name == "shard_map":
        return SHARDED
    if operation.name not in _LOCAL:
        return UNSUPPORTED
    outputs = [layouts[value] for value in operation.outputs]
    return MIXED if _mixes(operation, operands, outputs) else None


def _is_map(operation: Operation, layouts: Sequence[Layout]) -> bool:
    """Whether a scan does the same for every example, as `jax.lax.map` over the batch does."""
    num_consts = operation.carried.start
    return (
        not operation.carried
        and not any(layout.carries_batch for layout in layouts[:num_consts])
        and all(layout.problem is None and layout.batch_axes <= {0} for layout in layouts)
        and all(len(x.axes[0]) == 1 for x in layouts[num_consts:])
    )


def is_local(operation: Operation, layouts: Mapping[Value, Layout]) -> bool:
    """Whether each example's result depends on that example alone."""
    operands = [layouts[value] for value in operation.operands]
    outputs = [layouts[value] for value in operation.outputs]
    return operation.name in _LOCAL and not _mixes(operation, operands, outputs)


def _mixes(operation: Operation, layouts: Sequence[Layout], outputs: Sequence[Layout]) -> bool:
    """Whether one example's result depends on another's operand."""
    name, params = operation.name, operation.params
    axes = [layout.batch_axes for layout in layouts]
    made = frozenset().union(*(layout.batch_axes for layout in outputs))
    if name == "tile":
        # Repeated for every example only if there is nothing else to walk through on the axis.
        return any(operation.operands[0].shape[axis] != 1 for axis in made)
    if name != "broadcast_in_dim" and not any(axes):
        return True
    if name == "broadcast_in_dim":
        # Entries of its own for places in the batch, of which there would be others in a group.
        return any(
            target in made and source not in axes[0] and operation.operands[0].shape[source] != 1
            for source, target in enumerate(params["broadcast_dimensions"])
        )
    if name in ELEMENTWISE:
        shape = operation.outputs[0].shape
        return made != frozenset().union(*axes) or any(
            len(value.shape) == len(shape) and value.shape[axis] != 1 and axis not in carried
            for value, carried in zip(operation.operands, axes, strict=True)
            for axis in made
        )
    if name == "dot_general":
        contracted, batched = params["dimension_numbers"]
        return any(axes[side] & {*contracted[side]} for side in (0, 1)) or any(
            layouts[0].axes[i] != layouts[1].axes[j] and (i in axes[0] or j in axes[1])
            for i, j in zip(*batched, strict=True)
        )
    if name == "concatenate":
        return any(params["dimension"] in carried for carried in axes)
    if name == "gather":
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        pairs = dict(
            zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        )
        whole = {i for i, size in enumerate(operation.operands[0].shape) if sizes[i] == size}
        return any(
            layouts[0].axes[axis] != layouts[1].axes[pairs[axis]]
            if axis in pairs
            else axes[1] or axis in numbers.collapsed_slice_dims or axis not in whole
            for axis in axes[0]
        )
    if name == "pad":
        return any(params["padding_config"][axis] != (0, 0, 0) for axis in axes[0])
    if name.startswith("reduce_") and "axes" in params:
        return bool(axes[0] & {*params["axes"]})
    return False


def is_additive(operation: Operation) -> bool:
    """Whether terms that are added before the operation are added after it."""
    reached = [value.from_batch or value.from_params for value in operation.operands]
    return (
        operation.name in LINEAR
        or (operation.name in ("dot_general", "mul") and sum(reached) == 1)
        or (operation.name == "div" and reached == [True, False])
        or (operation.name == "select_n" and _chooses_sums(operation))
    )


def _chooses_sums(operation: Operation) -> bool:
    """Whether the batch does not decide over terms of parameters alone.

    It may over the loss with all its terms, as in `jnp.where(jnp.isfinite(loss), loss, 0)`.
    """
    choice, *cases = operation.operands
    return not choice.from_batch or all(x.from_batch or not x.from_params for x in cases)
