"""TVLARS: LARS whose ratio falls over time, in the place of a warm-up."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

import clars_optax
from train.optimizers.base import Optimizer
from train.optimizers.lars import TRUST_COEFFICIENT, lars

# Of the authors' code (github.com/KhoiDOO/tvlars): the factor's upper bound is the inverse.
ALPHA = 0.1

# The factor's decay rate over a whole run. The code's default is 0.001 per step, in examples with
# 100 epochs of CIFAR-10 in batches of 512, which are 9,800 steps; they try 0.000001 to 0.01.
DECAY = 10.0


def tvlars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    weight_decay: float,
    weight_decay_mask: Any,
    num_steps: int,
    nesterov: bool = False,
    trust_coefficient: float = TRUST_COEFFICIENT,
    max_trust_ratio: float = math.inf,
) -> Optimizer:
    r"""Makes `lars` with the ratio at step t = 0, 1, ... of T multiplied by a factor.

    .. math::
      \phi_t = \frac{1}{\alpha + \exp(\lambda (t + 1))}, \qquad
      \alpha = 0.1, \quad \lambda = \frac{10}{T}

    In a long run it begins near 0.9; it falls along a sigmoid to nearly 0. It is the schedule, and
    meant for a learning rate that is constant, without warm-up. As a part of the ratio it leaves
    biases and scales at the full rate. The ratio is capped before the factor.

    The formula is that of the authors' code. The paper's,
    :math:`\phi_t = 1 / (\alpha + \exp(\lambda (t - d_e))) + \gamma_{\min}`, has a delay and a floor
    as well, whose values we could not find, for its full text was not at hand. Left out are the
    code's clipping of both norms to at most 10 and its momentum buffer that holds the ratio: only
    the factor tells `tvlars` from `lars`.

    References:
        Do et al., `Revisiting LARS for Large Batch Training Generalization of Neural Networks
        <https://arxiv.org/abs/2309.14053>`_, 2023
    """

    def factor(step: jax.Array) -> jax.Array:
        return 1 / (ALPHA + jnp.exp(DECAY / num_steps * (step + 1)))

    constant = lars(
        learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        nesterov=nesterov,
        trust_coefficient=trust_coefficient,
        max_trust_ratio=max_trust_ratio,
    )
    transformation = optax.chain(
        constant.transformation,
        optax.masked(optax.scale_by_schedule(factor), clars_optax.default_mask),
    )

    def diagnose(
        params: Any, grads: Any, norms: Any, square_norms: Any, state: Any
    ) -> dict[str, Any]:
        ratios = constant.diagnose(params, grads, norms, square_norms, state[0])["trust_ratio"]
        now = factor(state[1].inner_state.count)
        mask = clars_optax.default_mask(params)
        return {
            "trust_ratio": jax.tree.map(
                lambda ratio, is_scaled: ratio * now if is_scaled else ratio, ratios, mask
            )
        }

    return Optimizer(transformation, needs_norms=False, diagnose=diagnose)
