"""LENA: every layer warms up at its own pace, which the noise of its gradient sets."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.optimizers.base import Optimizer, momentum_of_decayed, norms_of

# All three are those of the authors' code (github.com/yy-ko/lena-www22). Share of the run that the
# warm-up of a layer takes whose gradient is nothing but noise:
WARMUP_SHARE = 0.05

# Weight of the newest value in the moving averages, for each worker.
AVERAGE_WEIGHT = 1 / 1000

# Added to both moving averages.
EPS = 1e-6


class LenaState(NamedTuple):
    """State of `scale_by_lena`; trees like the parameters of float32 scalars.

    Attributes:
        inner: state of the transformation whose updates are scaled.
        mean_square: moving average of the groups' mean squared gradient norm.
        square_mean: moving average of the squared norm of the mean gradient.
        progress: steps at the full rate that the steps so far amount to.
    """

    inner: Any
    mean_square: Any
    square_mean: Any
    progress: Any


def lena(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    weight_decay: float,
    weight_decay_mask: Any,
    batch_size: int,
    group_size: int,
    num_steps: int,
    nesterov: bool = False,
) -> Optimizer:
    """Makes SGD with momentum whose rates LENA scales.

    The paper's S workers are the groups of the batch. The learning rate is the linearly scaled one,
    S times that of a group, and the most that a layer can get.

    Args:
        learning_rate: a number or a schedule, best without a warm-up.
        momentum: decay rate of the momentum buffer, 0.9 in the authors' code.
        weight_decay: coefficient of the decay.
        weight_decay_mask: where it acts; on all parameters in the authors' code.
        batch_size: examples per step, over all devices.
        group_size: examples per norm; a worker of the authors' code has 128.
        num_steps: steps of the whole run.
        nesterov: Nesterov's momentum instead of the heavy ball's.
    """
    inner = momentum_of_decayed(momentum, nesterov, weight_decay, weight_decay_mask)
    num_groups, warmup_steps = batch_size // group_size, WARMUP_SHARE * num_steps

    def diagnose(
        params: Any, grads: Any, norms: Any, square_norms: Any, state: Any
    ) -> dict[str, Any]:
        del params, norms
        return {"trust_ratio": _ratios(grads, square_norms, state[0], num_groups, warmup_steps)[0]}

    transformation = optax.chain(
        scale_by_lena(inner, num_groups, warmup_steps),
        optax.scale_by_learning_rate(learning_rate),
    )
    return Optimizer(transformation, needs_norms=True, diagnose=diagnose)


def scale_by_lena(
    inner: optax.GradientTransformation, num_groups: int, warmup_steps: float
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates of a transformation by gain and warm-up of each leaf.

    With :math:`g` the gradient of a leaf, :math:`g_i` those of S groups, :math:`\beta = S/1000`
    (1 at most) and all averages and :math:`p` zero at first, the updates are multiplied by

    .. math::
      a &\leftarrow (1 - \beta) a + \beta \frac{1}{S} \sum_i \|g_i\|^2 \\
      b &\leftarrow (1 - \beta) b + \beta \|g\|^2 \\
      r &= \min\left(S,\; \frac{a + 10^{-6}}{b + 10^{-6}}\right) \\
      \text{ratio} &= \frac{r}{S} \min(1, p / W) \\
      p &\leftarrow p + r / S

    The gain r lies between 1, where all groups agree, and S, where there is only noise; a layer of
    noise ends its warm-up after W steps, and others later. The very first ratio is 0.

    The authors write the rate as that of one worker times r, and p and W in batches of one worker,
    which is the same. Every tensor is a layer for them: biases and scales have ratios as well.
    Where r meets its bound, a branch of their code that is marked for their baseline, linear
    scaling, adds the gain of the whole network to p; here it is r as ever. All of this was read in
    the code, the paper's full text was not at hand.

    Args:
        inner: the transformation.
        num_groups: S.
        warmup_steps: W.

    Returns:
        A transformation whose `update` takes the mean over the groups of their squared gradient
        norms as `example_grad_square_norms`, a tree like the parameters of scalars.

    References:
        Ko, Lee and Kim, `Not All Layers Are Equal: A Layer-Wise Adaptive Approach Toward
        Large-Scale DNN Training <https://doi.org/10.1145/3485447.3511989>`_, 2022
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LenaState:
        # Three trees, for no buffer can be donated twice.
        zeros = (jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params) for _ in range(3))
        return LenaState(inner.init(params), *zeros)

    def update(
        grads: Any,
        state: LenaState,
        params: Any = None,
        *,
        example_grad_square_norms: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, LenaState]:
        if example_grad_square_norms is None:
            raise ValueError(
                "`example_grad_square_norms` is missing: LENA needs the mean of the squared norms "
                "of the per-example gradients. Get the norms from "
                "`clars_optax.value_and_grad_and_norms`."
            )
        updates, inner_state = inner.update(grads, state.inner, params, **extra_args)
        ratios, state = _ratios(grads, example_grad_square_norms, state, num_groups, warmup_steps)
        updates = jax.tree.map(lambda u, ratio: (u * ratio).astype(u.dtype), updates, ratios)
        return updates, state._replace(inner=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _ratios(
    grads: Any, square_norms: Any, state: LenaState, num_groups: int, warmup_steps: float
) -> tuple[Any, LenaState]:
    # The authors have fewer than 1,000 workers; beyond, an average would extrapolate.
    weight = min(num_groups * AVERAGE_WEIGHT, 1.0)
    square_means = jax.tree.map(jnp.square, norms_of(grads))
    mean_square = optax.incremental_update(square_norms, state.mean_square, weight)
    square_mean = optax.incremental_update(square_means, state.square_mean, weight)
    gains = jax.tree.map(
        lambda a, b: jnp.minimum((a + EPS) / (b + EPS), num_groups) / num_groups,
        mean_square,
        square_mean,
    )
    ratios = jax.tree.map(
        lambda gain, progress: gain * jnp.minimum(progress / warmup_steps, 1.0),
        gains,
        state.progress,
    )
    progress = jax.tree.map(jnp.add, state.progress, gains)
    return ratios, LenaState(state.inner, mean_square, square_mean, progress)
