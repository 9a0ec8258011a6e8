"""LAMB: Adam with layer-wise rates."""

from typing import Any

import optax

import clars_optax
from train.optimizers.base import Optimizer, trust_ratios

# Of `optax.lamb`; You et al., "Large Batch Optimization for Deep Learning" (2020), have them too.
B2 = 0.999
EPS = 1e-6


def lamb(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    weight_decay: float,
    weight_decay_mask: Any,
) -> Optimizer:
    r"""Makes `optax.lamb` from its parts, for it has no mask for the trust ratio.

    With :math:`\hat m` and :math:`\hat v` Adam's unbiased moving averages of the gradient and of
    its square:

    .. math::
      u &= \frac{\hat m}{\sqrt{\hat v} + 10^{-6}} + \lambda w \\
      w &\leftarrow w - \gamma \frac{\|w\|}{\|u\|} u

    Args:
        learning_rate: a number or a schedule.
        momentum: decay rate of Adam's first moment, b1; that of the second is 0.999.
        weight_decay: coefficient of the decay.
        weight_decay_mask: where it acts.
    """
    direction = optax.chain(
        optax.scale_by_adam(b1=momentum, b2=B2, eps=EPS),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
    )
    transformation = optax.chain(
        direction,
        optax.masked(optax.scale_by_trust_ratio(), clars_optax.default_mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def diagnose(
        params: Any, grads: Any, norms: Any, square_norms: Any, state: Any
    ) -> dict[str, Any]:
        del norms, square_norms
        updates, _ = direction.update(grads, state[0], params)
        return {"trust_ratio": trust_ratios(params, updates)}

    return Optimizer(
        optax.with_extra_args_support(transformation), needs_norms=False, diagnose=diagnose
    )
