"""The optimizers by name, so built that they differ in little but the rates of the layers.

======================  ============================================================================
name                    step of a layer with weights w, gradient g, per-example gradients g_i
======================  ============================================================================
clars                   0.01 ||w|| / mean ||g_i||, at most 0.1, times the momentum buffer
lars                    0.001 ||w|| / ||g + decay||, times the momentum buffer
tvlars                  lars times a factor that falls over the run
optax-lars              lars with ratio and learning rate inside the momentum buffer
lamb                    Adam's direction d plus decay, times ||w|| / ||d + decay||
sgd                     the momentum buffer
lena                    the momentum buffer times gain and warm-up of the layer, which depend on
                        mean ||g_i||^2 / ||g||^2
======================  ============================================================================

All but lamb add the decay to the gradient before the momentum. Biases and BatchNorm scales have the
ratio 1 (but for lena, where they are layers like others).
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import optax

import clars_optax
from train.optimizers.base import Optimizer
from train.optimizers.clars import clars
from train.optimizers.lamb import lamb
from train.optimizers.lars import lars, optax_lars
from train.optimizers.lena import lena
from train.optimizers.sgd import sgd
from train.optimizers.tvlars import tvlars
from train.text import listed

__all__ = ["Optimizer", "OptimizerName", "make_optimizer"]

OptimizerName = Literal["clars", "lars", "optax-lars", "lamb", "sgd", "lena", "tvlars"]

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "clars": clars,
    "lars": lars,
    "optax-lars": optax_lars,
    "lamb": lamb,
    "sgd": sgd,
    "lena": lena,
    "tvlars": tvlars,
}


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    weight_decay_mask: Literal["weights", "all"] = "weights",
    trust_coefficient: float | None,
    max_trust_ratio: float | None,
    batch_size: int,
    group_size: int,
    num_steps: int,
) -> Optimizer:
    """Makes an optimizer, and computes nothing: a call is the cheapest check of its options.

    Args:
        name: one of `OptimizerName`.
        learning_rate: a number or a schedule; for the whole batch, with lena too.
        momentum: decay rate of the momentum buffer; with lamb that of Adam's first moment.
        nesterov: Nesterov's momentum instead of the heavy ball's.
        weight_decay: coefficient of the decay.
        weight_decay_mask: "weights": biases and scales do not decay. "all": they do.
        trust_coefficient: factor of the trust ratios; None for the optimizer's own.
        max_trust_ratio: their upper bound; None for the optimizer's own.
        batch_size: examples per step, over all devices.
        group_size: examples per norm.
        num_steps: steps of the whole run.

    Raises:
        ValueError: if there is no such optimizer, or it has no place for an option.
    """
    if name not in _OPTIMIZERS:
        names = listed(map(repr, get_args(OptimizerName)), "or")
        raise ValueError(f"--optimizer is {name!r}, but must be {names}.")
    asked_for = {
        option: value
        for option, value in {
            "nesterov": nesterov or None,
            "trust_coefficient": trust_coefficient,
            "max_trust_ratio": max_trust_ratio,
        }.items()
        if value is not None
    }
    for option, value in asked_for.items():
        having = [other for other in _OPTIMIZERS if option in _parameters(other)]
        if name not in having:
            flag = "--" + option.replace("_", "-")
            # A named configuration may have brought it.
            without = "--no-nesterov" if option == "nesterov" else f"{flag} None"
            raise ValueError(
                f"{flag} is {value}, but the optimizer {name} has no such thing: say {without}, or "
                f"choose {listed(map(repr, having), 'or')}."
            )
    known: dict[str, Any] = {
        "momentum": momentum,
        "weight_decay": weight_decay,
        "weight_decay_mask": clars_optax.default_mask if weight_decay_mask == "weights" else True,
        "batch_size": batch_size,
        "group_size": group_size,
        "num_steps": num_steps,
    }
    wanted = {option: value for option, value in known.items() if option in _parameters(name)}
    return _OPTIMIZERS[name](learning_rate, **wanted, **asked_for)


def _parameters(name: str) -> set[str]:
    return set(inspect.signature(_OPTIMIZERS[name]).parameters)
