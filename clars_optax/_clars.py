"""CLARS: layer-wise rates from the mean norm of the per-example gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from clars_optax._checks import (
    check_alike,
    check_bools,
    check_non_negative,
    check_scalars,
    checked_mask,
)
from clars_optax._default_mask import default_mask
from clars_optax._trees import is_hole
from clars_optax._trust_ratio import match_norms, trust_ratio


def scale_by_clars(
    trust_coefficient: ArrayLike = 0.01,
    max_trust_ratio: ArrayLike = 0.1,
    eps: ArrayLike = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the update of each leaf by its CLARS trust ratio.

    With :math:`n = \frac{1}{N} \sum_i \|g_i\|` the mean norm of the per-example gradients of a leaf
    :math:`w`, its update is multiplied by

    .. math::
      \min\left(\text{max\_trust\_ratio},\;
        \text{trust\_coefficient} \cdot \frac{\|w\|}{n + \text{eps}}\right)

    ======================  ==========================================================
    case                    ratio
    ======================  ==========================================================
    ``w`` or ``n`` is zero  min(max_trust_ratio, 1)
    leaf masked out         1, the leaf's update passes unchanged
    ``n`` NaN or infinite   NaN: never hidden
    a norm is negative      NaN: it is no norm
    low-precision leaves    norms and ratio in float32, the update keeps its dtype
    ======================  ==========================================================

    The transformation has no state. Its ``update`` needs ``params`` and ``example_grad_norms``: a
    tree like ``params`` whose leaves are vectors of norms, which are averaged, or scalars, which
    are means already (after ``jax.lax.pmean``, for instance). Norms at a leaf that is masked out
    are ignored, so that :func:`optax.masked` and :func:`optax.partition` need no further argument.

    Args:
      trust_coefficient: factor of the ratio.
      max_trust_ratio: its upper bound; ``float("inf")`` for none.
      eps: added to the mean norm.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: if an argument is not a real scalar; from ``update`` if a leaf is not a real
        floating-point array.
      ValueError: if an argument is negative or NaN; from ``update`` if ``params`` or
        ``example_grad_norms`` is missing, or updates or norms do not fit the parameters.

    Example:
      >>> import clars_optax
      >>> import jax
      >>> import jax.numpy as jnp
      >>> tx = clars_optax.scale_by_clars(trust_coefficient=1.0, max_trust_ratio=1.0)
      >>> w, xs = jnp.array([3.0, 4.0]), jnp.array([[6.0, 8.0], [0.0, 10.0]])
      >>> example_grads = jax.vmap(jax.grad(jnp.vdot), in_axes=(None, 0))(w, xs)
      >>> norms = jnp.linalg.norm(example_grads, axis=1)
      >>> updates, _ = tx.update(example_grads.mean(0), tx.init(w), w, example_grad_norms=norms)
      >>> [f"{u:.3f}" for u in updates]  # half of the gradient [3, 9]
      ['1.500', '4.500']

      In a chain, biases and scales are masked out, since it scales every leaf:

      >>> import optax
      >>> tx = optax.chain(
      ...     optax.trace(decay=0.9),
      ...     optax.masked(clars_optax.scale_by_clars(), clars_optax.default_mask),
      ...     optax.scale_by_learning_rate(2.0),
      ... )
      >>> _ = tx.update(w, tx.init(w), w, example_grad_norms=norms)
    """
    check_non_negative(
        trust_coefficient=trust_coefficient, max_trust_ratio=max_trust_ratio, eps=eps
    )

    def init_fn(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        example_grad_norms: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.EmptyState]:
        del extra_args
        _check_given(params)
        # A parameter that has no update needs no norm either.
        check_alike("updates", updates, "params", params, ignore_masked=True)
        if example_grad_norms is None:
            raise ValueError(
                "`example_grad_norms` is missing: CLARS needs the norms of the per-example "
                "gradients. Get them from `clars_optax.value_and_grad_and_norms` and call "
                "`tx.update(grads, state, params, example_grad_norms=norms)`. If you did, what "
                "calls `update` drops extra arguments, as `TrainState.apply_gradients` of Flax "
                "does, and `optax.chain` where a part takes none."
            )
        live = jax.tree.map(lambda u, p: u if is_hole(u) else p, updates, params, is_leaf=is_hole)

        def scale(update: Any, param: Any, norm: Any) -> Any:
            if is_hole(norm):
                return update
            ratio = trust_ratio(param, jnp.mean(norm), trust_coefficient, max_trust_ratio, eps)
            dtype = jnp.result_type(update)
            wide = dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
            return (jnp.asarray(update, wide) * ratio.astype(wide)).astype(dtype)

        norms = match_norms(live, example_grad_norms)
        return jax.tree.map(scale, updates, live, norms, is_leaf=is_hole), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clars(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike = 0.9,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = default_mask,
    trust_coefficient: ArrayLike = 0.01,
    max_trust_ratio: ArrayLike = 0.1,
    eps: ArrayLike = 1e-6,
    trust_ratio_mask: Any = default_mask,
) -> optax.GradientTransformationExtraArgs:
    r"""Complete layer-wise adaptive rate scaling: large batches without warm-up.

    For a leaf :math:`w` with gradient :math:`g` and per-example gradients :math:`g_i`, with
    :math:`\mu` the momentum, :math:`\lambda` the weight decay and :math:`\gamma` the learning rate:

    .. math::
      m &\leftarrow \mu m + g + \lambda w \\
      r &= \min\left(\text{max\_trust\_ratio},\; \text{trust\_coefficient} \cdot
           \frac{\|w\|}{\frac{1}{N} \sum_i \|g_i\| + \text{eps}}\right) \\
      w &\leftarrow w - \gamma\, r\, m

    LARS divides by the norm of the mean gradient instead, which is never larger: where the examples
    disagree, as they do early in training, CLARS takes smaller steps by itself. The ratio stands
    outside the momentum buffer, and the decay stays out of the norms. :func:`scale_by_clars` lists
    the edge cases.

    .. warning::
      :func:`optax.flatten` makes one vector of all layers, which is masked out: momentum SGD is
      left.

      :class:`optax.MultiSteps` averages the gradients of its mini-steps, but hands on only the last
      mini-step's norms. Accumulate with ``microbatch_size`` of
      :func:`clars_optax.value_and_grad_and_norms` instead, and call ``update`` once.

    **Clipping.** Take the norms of the unclipped gradients, and clip after the ratio has made use
    of them: ``optax.chain(clars(...), optax.clip_by_global_norm(...))`` bounds the step.

    **Padded or weighted losses.** With ``loss_reduction="sum"`` on the unnormalised loss, sum
    the gradients, the norms and the weights over micro-batches and devices, then divide all
    three by the sum of the weights before calling ``update``. ``microbatch_size`` has summed
    gradients over its micro-batches already, and weights belong to the whole batch::

      total = jnp.sum(weights)  # of the batch, not of what the loss gets
      grads = jax.tree.map(lambda g: g / total, grads)
      norms = jax.tree.map(lambda n: jnp.sum(n) / total, norms)

    **Several devices.** For "mean" losses with equal shards the mean is exact:
    ``jax.lax.pmean(jax.tree.map(jnp.mean, norms), axis_name)``. In a ``jax.shard_map``, only the
    gradient takes parameters marked as varying; ``update`` gets the parameters themselves.

    **Changing hyperparameters.** Masks are callables, but no schedules::

      masks = ("weight_decay_mask", "trust_ratio_mask")
      tx = optax.inject_hyperparams(clars_optax.clars, static_args=masks)(learning_rate=0.1)

    Args:
      learning_rate: a global factor, fixed or a schedule.
      momentum: decay rate of the momentum buffer, which has the dtype of the parameters.
      nesterov: whether to use Nesterov momentum.
      weight_decay: factor of the parameters that are added to the gradients, fixed or a schedule.
      weight_decay_mask: True where weights decay: a bool, a tree (or a prefix of one) like the
        parameters, or a callable that returns one given the parameters or the updates. None:
        everywhere.
      trust_coefficient: factor of the trust ratio.
      max_trust_ratio: upper bound of the trust ratio.
      eps: added to the mean norm.
      trust_ratio_mask: likewise, True where the ratio is used; elsewhere it is 1.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`, whose ``update`` takes the
      norms as ``example_grad_norms``.

    Raises:
      TypeError, ValueError: as :func:`scale_by_clars`, but that a learning rate may have any value;
        from ``update`` also if a mask or the state does not fit the parameters.

    Example:
      >>> import clars_optax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> def loss_fn(params, batch):
      ...   return jnp.mean((batch["x"] @ params["kernel"] - batch["y"]) ** 2)
      >>> batch = {"x": jnp.eye(4), "y": jnp.ones((4, 2))}
      >>> params = {"kernel": jnp.full((4, 2), 0.1)}
      >>> tx = clars_optax.clars(learning_rate=50.0)
      >>> state = tx.init(params)
      >>> step = clars_optax.value_and_grad_and_norms(loss_fn)
      >>> for _ in range(5):
      ...   loss, grads, norms = step(params, batch)
      ...   updates, state = tx.update(grads, state, params, example_grad_norms=norms)
      ...   params = optax.apply_updates(params, updates)
      ...   print(f"{loss:.3f}")
      0.810
      0.766
      0.664
      0.466
      0.129

    References:
      Huo et al., `Large Batch Training Does Not Need Warmup
      <https://arxiv.org/abs/2002.01576>`_, 2020
    """
    check_non_negative(momentum=momentum)
    check_bools(nesterov=nesterov)
    if not callable(learning_rate):
        check_scalars(learning_rate=learning_rate)
    if not callable(weight_decay):
        check_non_negative(weight_decay=weight_decay)
    parts = (
        optax.add_decayed_weights(
            weight_decay, mask=checked_mask("weight_decay_mask", weight_decay_mask)
        ),
        optax.trace(decay=momentum, nesterov=nesterov),
        optax.masked(
            scale_by_clars(trust_coefficient, max_trust_ratio, eps),
            checked_mask("trust_ratio_mask", trust_ratio_mask),
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
    chain = optax.chain(*parts)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        _check_given(params)
        check_alike("updates", updates, "params", params)
        check_alike("updates", updates, "state", _momentum_buffer(state, len(parts)))
        new_updates, new_state = chain.update(updates, state, params, **extra_args)
        # Hyperparameters that are arrays (`inject_hyperparams`) promote bfloat16 leaves, and a
        # state that changes its dtype recompiles the step and cannot be carried by `lax.scan`.
        return _cast_like(new_updates, updates), _cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def _check_given(params: Any) -> None:
    if params is None:
        raise ValueError(
            "`params` is missing: CLARS scales each update by the norm of its parameter. Call "
            "`tx.update(grads, state, params, example_grad_norms=norms)`."
        )


def _momentum_buffer(state: Any, num_parts: int) -> Any:
    parts = state if isinstance(state, tuple | list) else ()
    buffers = [part.trace for part in parts if isinstance(part, optax.TraceState)]
    if len(buffers) != 1 or len(parts) != num_parts:
        names = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(
            f"`state` is of type {type(state).__name__} ({names}): expected is that of `clars`, of "
            f"{num_parts} parts with one momentum. Pass what `tx.init(params)` or the last "
            "`tx.update` returned."
        )
    return buffers[0]


def _cast_like(tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, other)
