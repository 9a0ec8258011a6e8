"""How the batch moves through primitives that work along some axes and leave the others alone."""

from collections.abc import Sequence, Set

from clars_optax.norms._layout import Layout, only, plain_axis, unknown
from clars_optax.norms._program import Operation, Value

_LAST_TWO = frozenset(
    """
    cholesky eig eigh hessenberg householder_product lu qr schur svd triangular_solve tridiagonal
    """.split()
)
"""Primitives for matrices, of which there may be many."""


def along(operation: Operation, given: Sequence[Layout], output: Value) -> Layout | None:
    """The layout of a result, if the batch is only on axes that the operation leaves alone.

    Args:
      operation: any.
      given: the layouts of its operands.
      output: the result.

    Returns:
      None if the batch is elsewhere, or it is not known which axes are left alone.
    """
    if not any(layout.carries_batch for layout in given):
        return None
    rank = len(operation.operands[0].shape)
    worked = _worked_axes(operation, rank)
    if worked is None or any(layout.problem or layout.batch_axes & worked for layout in given):
        return None
    axes = []
    for index, size in enumerate(output.shape):
        entering = [
            layout.axes[index]
            for value, layout in zip(operation.operands, given, strict=True)
            if index not in worked and len(value.shape) == rank
        ]
        axis = only(entering)
        if axis is None:
            return unknown(output.shape, "two arrangements of the batch meet")
        axes.append(axis or plain_axis(size))
    return Layout(tuple(axes))


def _worked_axes(operation: Operation, rank: int) -> Set[int] | None:
    """The axes of the first operand along which a result depends on several of its entries."""
    name, params = operation.name, operation.params
    if "window_dimensions" in params:
        # Pooling, its derivatives and cumulative sums.
        alone = zip(
            params["window_dimensions"],
            params["window_strides"],
            params["padding"],
            params.get("base_dilation") or (1,) * rank,
            strict=True,
        )
        return {index for index, one in enumerate(alone) if one != (1, 1, (0, 0), 1)}
    if name == "sort":
        return {params["dimension"]}
    if name == "top_k":
        return {params.get("axis", -1) % rank}
    if name == "approx_top_k":
        return {params["reduction_dimension"] % rank}
    if name == "fft":
        return {*range(rank - len(params["fft_lengths"]), rank)}
    if name in _LAST_TWO:
        return {rank - 2, rank - 1}
    return None
