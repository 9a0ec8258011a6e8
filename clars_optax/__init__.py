"""Large-batch training without warm-up: CLARS for Optax, and exact per-example gradient norms."""

from clars_optax._clars import clars, scale_by_clars
from clars_optax._default_mask import default_mask
from clars_optax._diagnostics import Diagnostics, diagnostics
from clars_optax._from_example_grads import from_example_grads
from clars_optax.norms import value_and_grad_and_norms

__all__ = [
    "Diagnostics",
    "clars",
    "default_mask",
    "diagnostics",
    "from_example_grads",
    "scale_by_clars",
    "value_and_grad_and_norms",
]
