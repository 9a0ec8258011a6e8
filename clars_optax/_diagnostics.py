"""What the per-example gradient norms say about each layer: trust ratio, noise, batch size."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from clars_optax._checks import check_alike, check_non_negative, checked_mask
from clars_optax._default_mask import default_mask
from clars_optax._trees import is_hole, leaf_name
from clars_optax._trust_ratio import match_norms, trust_ratio


class Diagnostics(NamedTuple):
    r"""Trees like the parameters, with one float32 scalar per leaf.

    Attributes:
      trust_ratio: the ratio that :func:`clars` uses; 1 where it is masked out.
      variance_factor: :math:`M = E\|g_i\|^2 / \|E g_i\|^2`.
      signal_to_noise_ratio: :math:`\|E g_i\|^2 / E\|g_i - E g_i\|^2 = 1 / (M - 1)`.
      noise_scale: an estimate of the batch size at which noise and signal balance, in examples.
    """

    trust_ratio: Any
    variance_factor: Any
    signal_to_noise_ratio: Any
    noise_scale: Any


def diagnostics(
    params: Any,
    grads: Any,
    norms: Any,
    *,
    batch_size: int,
    group_size: int = 1,
    axis_name: Any = None,
    mean_square_norms: Any = None,
    trust_coefficient: ArrayLike = 0.01,
    max_trust_ratio: ArrayLike = 0.1,
    eps: ArrayLike = 1e-6,
    trust_ratio_mask: Any = default_mask,
) -> Diagnostics:
    r"""Computes trust ratio, variance factor, signal-to-noise ratio and noise scale of each leaf.

    With B the batch size, b the group size, :math:`g_B` the gradient of the batch, :math:`g_b` that
    of a group and :math:`\overline{|g_b|^2}` the mean over the groups that have norms:

    .. math::
      M = \frac{\overline{|g_b|^2}}{|g_B|^2}, \qquad
      \text{SNR} = \frac{|g_B|^2}{\overline{|g_b|^2} - |g_B|^2}, \qquad
      \text{noise scale} = \frac{\left(\overline{|g_b|^2} - |g_B|^2\right) / (1/b - 1/B)}
                                {\left(B |g_B|^2 - b \overline{|g_b|^2}\right) / (B - b)}

    The first two are about groups, single examples by default, and put the batch's gradient in the
    place of the true one. Its noise counts as signal: the variance factor comes out too small, the
    signal-to-noise ratio too large, and in pure noise they stay near B/b and b/(B - b) instead of
    infinity and 0. The noise scale corrects for that. Numerator and denominator are unbiased
    estimates of :math:`S = E|g_i - G|^2` and :math:`|G|^2`, G the true gradient, but not their
    quotient: where :math:`|G|^2` is small against S/B it may be negative or infinite. Average
    over steps before you trust it.

    ===============================  ======================================================
    case                             result
    ===============================  ======================================================
    batch_size equals group_size     noise scale NaN: two sizes are needed
    no noise (all examples agree)    variance factor 1, SNR infinite, noise scale 0
    noise estimated below zero       SNR infinite, noise scale negative; this needs norms of
                                     a part of the batch, or rounding
    gradient and norms zero          NaN (the trust ratio is that of :func:`scale_by_clars`)
    ===============================  ======================================================

    Args:
      params: the parameters.
      grads: the gradient, a mean over ``batch_size`` examples. If the loss is a sum, divide
        them, not the norms, by ``batch_size``.
      norms: a tree like ``params`` of vectors, one norm per group, of the whole batch or a part; or
        of scalars, their means, for those who accumulate norms: then ``mean_square_norms`` too.
      batch_size: number of examples in the whole batch, over all devices.
      group_size: number of examples whose mean gradient each norm is of.
      axis_name: name of the mapped axis, or axes, whose devices hold equal shares of the batch;
        grads (of the device, or averaged already) and norms are averaged over it.
      mean_square_norms: a tree like ``params`` of the means of the squared norms, where ``norms``
        are means.
      trust_coefficient: as in :func:`clars`.
      max_trust_ratio: as in :func:`clars`.
      eps: as in :func:`clars`.
      trust_ratio_mask: as in :func:`clars`.

    Returns:
      A :class:`Diagnostics` of trees like ``params``.

    Raises:
      TypeError: if a size is no integer, or a leaf is not a real floating-point array.
      ValueError: if the sizes contradict each other, the trees do not fit each other, or a leaf of
        ``norms`` is a scalar and there are no ``mean_square_norms``.

    Example:
      >>> import clars_optax
      >>> import jax
      >>> import jax.numpy as jnp
      >>> w, xs = jnp.array([3.0, 4.0]), jnp.array([[6.0, 8.0], [0.0, 10.0]])
      >>> example_grads = jax.vmap(jax.grad(jnp.vdot), in_axes=(None, 0))(w, xs)
      >>> norms = jnp.linalg.norm(example_grads, axis=1)
      >>> d = clars_optax.diagnostics(w, example_grads.mean(0), norms, batch_size=2)
      >>> print(f"{d.variance_factor:.3f} {d.signal_to_noise_ratio:.3f} {d.noise_scale:.3f}")
      1.111 9.000 0.250

    References:
      McCandlish et al., `An Empirical Model of Large-Batch Training
      <https://arxiv.org/abs/1812.06162>`_, 2018
    """
    batch_size, group_size = _size("batch_size", batch_size), _size("group_size", group_size)
    if group_size < 1 or batch_size % group_size or batch_size < 1:
        raise ValueError(
            f"`batch_size` is {batch_size} and `group_size` is {group_size}: expected is a batch of"
            " one or more whole groups. `batch_size` counts the examples of all devices."
        )
    check_non_negative(
        trust_coefficient=trust_coefficient, max_trust_ratio=max_trust_ratio, eps=eps
    )
    if params is None:
        raise ValueError("`params` is missing: the ratios are those of the parameters. Pass them.")
    check_alike("params", params, "grads", grads, ignore_masked=True)
    vectors = match_norms(params, norms, "norms")
    squares: Any
    if mean_square_norms is None:
        squares = jax.tree.map(jnp.square, vectors)
    else:
        squares = match_norms(params, mean_square_norms, "mean_square_norms")
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    for path, vector in jax.tree_util.tree_leaves_with_path(vectors):
        if vector.ndim != 1 and mean_square_norms is None:
            raise ValueError(
                f"`norms` at {leaf_name(path)} is a scalar: `diagnostics` needs the vector of "
                "norms, one per example or group, because it takes the mean of their squares. Call "
                "it before you average them, or pass the mean of the squares as "
                "`mean_square_norms`."
            )
        if vector.size * group_size * devices > batch_size:
            raise ValueError(
                f"`norms` at {leaf_name(path)} has {vector.size} norms, each of {group_size} "
                f"example(s), on each of {devices} device(s): expected are no more examples than "
                f"`batch_size`, {batch_size}, which counts those of all devices."
            )

    mask = checked_mask("trust_ratio_mask", trust_ratio_mask)(params)
    mask = jax.tree.map(lambda m, p: jax.tree.map(lambda _: m, p), mask, params)

    def mean(x: Any) -> Any:
        return x if axis_name is None else jax.lax.pmean(x, axis_name)

    def of_leaf(param: Any, is_scaled: Any, grad: Any, vector: Any, square: Any) -> Diagnostics:
        if is_hole(param):
            return Diagnostics(param, param, param, param)
        mean_norm = mean(jnp.mean(vector))
        small = mean(jnp.mean(square))
        big = jnp.sum(jnp.square(mean(jnp.asarray(grad, jnp.float32))))
        ratio = trust_ratio(param, mean_norm, trust_coefficient, max_trust_ratio, eps)
        if batch_size > group_size:
            noise = (small - big) / (1 / group_size - 1 / batch_size)
            signal = (batch_size * big - group_size * small) / (batch_size - group_size)
            noise_scale = noise / signal
        else:
            noise_scale = jnp.full((), jnp.nan, jnp.float32)
        return Diagnostics(
            trust_ratio=ratio if is_scaled else jnp.ones((), jnp.float32),
            variance_factor=small / big,
            signal_to_noise_ratio=big / jnp.maximum(small - big, 0.0),
            noise_scale=noise_scale,
        )

    rows = jax.tree.map(of_leaf, params, mask, grads, vectors, squares, is_leaf=is_hole)
    return Diagnostics(
        *(
            jax.tree.map(operator.itemgetter(i), rows, is_leaf=lambda x: isinstance(x, Diagnostics))
            for i in range(len(Diagnostics._fields))
        )
    )


def _size(name: str, size: Any) -> int:
    try:
        if isinstance(size, bool):
            raise TypeError
        return operator.index(size)
    except TypeError:
        raise TypeError(
            f"`{name}` is {size!r}: expected is an int, the number of examples."
        ) from None
