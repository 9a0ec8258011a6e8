"""Which value of a loss is which of the same loss at twice the batch size."""

from typing import Any

from clars_optax.norms._program import Operation, Program, Value

# What an operation does, whatever the sizes of its operands are.
_SIZELESS_PARAMS = frozenset(
    """
    axes axis broadcast_dimensions dimension dimension_numbers dimensions permutation reverse
    """.split()
)

# Twice as many where each example has a kernel of its own.
_GROUPS = ("batch_group_count", "feature_group_count")


def match(program: Program, doubled: Program) -> dict[Value, Value]:
    """Pairs the values of a program with those of the same loss at twice the batch size.

    It walks backwards from the outputs: where two operations agree, so do their operands. A part
    that differs with the batch size (`random.permutation` sorts in more rounds) ends the walk
    there. What that part makes of the batch is still known by its place in the operation that takes
    it; a value that comes from parameters has no pair then.
    """
    pairs = dict(zip(program.inputs, doubled.inputs, strict=True))
    pending = list(zip(program.outputs, doubled.outputs, strict=True))
    torn: set[Value] = set()
    while pending:
        one, two = pending.pop()
        if one in torn or pairs.get(one) is two:
            continue
        first, second = one.producer, two.producer
        agree = first is not None and second is not None and _agree(first, second)
        if one.from_params and (one in pairs or not agree):
            torn.add(one)
            pairs.pop(one, None)
            continue
        if one in pairs:
            continue
        pairs[one] = two
        if first is not None and second is not None and agree:
            pairs.update(zip(first.outputs, second.outputs, strict=True))
            pending.extend(zip(first.operands, second.operands, strict=True))
            for body, other in zip(first.bodies, second.bodies, strict=True):
                pairs.update(zip(body.inputs, other.inputs, strict=True))
                pending.extend(zip(body.outputs, other.outputs, strict=True))
    return pairs


def _agree(first: Operation, second: Operation) -> bool:
    """Whether two operations are the same but for sizes."""
    return (
        first.name == second.name
        and first.positions == second.positions
        and first.carried.start == second.carried.start
        and first.carried.stop == second.carried.stop
        and [len(body.outputs) for body in first.bodies]
        == [len(body.outputs) for body in second.bodies]
        and [_kind(value) for value in first.operands] == [_kind(v) for v in second.operands]
        and all(
            first.params[name] == second.params[name]
            for name in first.params.keys() & _SIZELESS_PARAMS
        )
        and all(
            second.params[name] in (first.params[name], 2 * first.params[name])
            for name in first.params.keys() & {*_GROUPS}
        )
    )


def _kind(value: Value) -> tuple[Any, ...]:
    return value.aval.dtype, len(value.shape), value.from_params, value.from_batch
