"""Exact per-example gradient norms of an unmodified JAX loss function."""

from clars_optax.norms._transform import value_and_grad_and_norms

__all__ = ["value_and_grad_and_norms"]
