"""LARS twice: as CLARS with another denominator, and as Optax has it."""

import math
from typing import Any

import optax

import clars_optax
from train.optimizers.base import Optimizer, norms_of, trust_ratios

# You et al., "Large Batch Training of Convolutional Networks" (2017), and Optax's default.
TRUST_COEFFICIENT = 0.001

# Of `clars_optax.clars`, whose denominator LARS replaces.
EPS = 1e-6


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    weight_decay: float,
    weight_decay_mask: Any,
    nesterov: bool = False,
    trust_coefficient: float = TRUST_COEFFICIENT,
    max_trust_ratio: float = math.inf,
) -> Optimizer:
    r"""Makes CLARS with the norm of (gradient + decay) as the denominator, by default uncapped.

    .. math::
      d &= g + \lambda w \\
      m &\leftarrow \mu m + d \\
      w &\leftarrow w - \gamma \min\left(\text{max\_trust\_ratio},\;
           \text{trust\_coefficient} \cdot \frac{\|w\|}{\|d\| + 10^{-6}}\right) m

    You et al. have the ratio and the learning rate within the buffer, as `optax_lars` does, and
    :math:`\|g\| + \lambda \|w\|` as the denominator, which is never less.
    """
    decay = optax.add_decayed_weights(weight_decay, weight_decay_mask)
    chain = clars_optax.clars(
        learning_rate,
        momentum,
        nesterov,
        weight_decay,
        weight_decay_mask,
        trust_coefficient,
        max_trust_ratio,
        EPS,
    )

    def decayed(grads: Any, params: Any) -> Any:
        return decay.update(grads, decay.init(params), params)[0]

    def update(
        grads: Any, state: optax.OptState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        del extra_args
        norms = norms_of(decayed(grads, params))
        return chain.update(grads, state, params, example_grad_norms=norms)

    def diagnose(
        params: Any, grads: Any, norms: Any, square_norms: Any, state: Any
    ) -> dict[str, Any]:
        del norms, square_norms, state
        ratios = trust_ratios(
            params,
            decayed(grads, params),
            trust_coefficient=trust_coefficient,
            max_trust_ratio=max_trust_ratio,
            eps=EPS,
        )
        return {"trust_ratio": ratios}

    transformation = optax.GradientTransformationExtraArgs(chain.init, update)
    return Optimizer(transformation, needs_norms=False, diagnose=diagnose)


def optax_lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    weight_decay: float,
    weight_decay_mask: Any,
    nesterov: bool = False,
    trust_coefficient: float = TRUST_COEFFICIENT,
) -> Optimizer:
    r"""Makes `optax.lars`, whose momentum buffer holds the rates too.

    That is as in the paper, but for the denominator (see `lars`).

    .. math::
      d &= g + \lambda w \\
      m &\leftarrow \mu m + \gamma\, \text{trust\_coefficient} \frac{\|w\|}{\|d\|} d \\
      w &\leftarrow w - m
    """
    decay = optax.add_decayed_weights(weight_decay, weight_decay_mask)
    transformation = optax.lars(
        learning_rate,
        weight_decay,
        weight_decay_mask,
        trust_coefficient,
        trust_ratio_mask=clars_optax.default_mask,
        momentum=momentum,
        nesterov=nesterov,
    )

    def diagnose(
        params: Any, grads: Any, norms: Any, square_norms: Any, state: Any
    ) -> dict[str, Any]:
        del norms, square_norms, state
        decayed, _ = decay.update(grads, decay.init(params), params)
        return {"trust_ratio": trust_ratios(params, decayed, trust_coefficient=trust_coefficient)}

    return Optimizer(
        optax.with_extra_args_support(transformation), needs_norms=False, diagnose=diagnose
    )
