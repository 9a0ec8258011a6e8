"""CLARS, the optimizer of this project."""

from typing import Any

import optax

import clars_optax
from train.optimizers.base import Optimizer


def clars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    weight_decay: float,
    weight_decay_mask: Any,
    batch_size: int,
    group_size: int,
    nesterov: bool = False,
    trust_coefficient: float = 0.01,
    max_trust_ratio: float = 0.1,
) -> Optimizer:
    """Makes `clars_optax.clars`; the defaults are those of the authors' code.

    The variance factor of each layer is plotted too: it is what CLARS's analysis is about.
    """

    def diagnose(
        params: Any, grads: Any, norms: Any, square_norms: Any, state: Any
    ) -> dict[str, Any]:
        del state
        quantities = clars_optax.diagnostics(
            params,
            grads,
            norms,
            mean_square_norms=square_norms,
            batch_size=batch_size,
            group_size=group_size,
            trust_coefficient=trust_coefficient,
            max_trust_ratio=max_trust_ratio,
        )
        return {
            "trust_ratio": quantities.trust_ratio,
            "variance_factor": quantities.variance_factor,
        }

    transformation = clars_optax.clars(
        learning_rate,
        momentum,
        nesterov,
        weight_decay,
        weight_decay_mask,
        trust_coefficient,
        max_trust_ratio,
    )
    return Optimizer(transformation, needs_norms=True, diagnose=diagnose)
