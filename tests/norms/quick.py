"""Compilation that is quick, for programs that run once."""

import functools

import jax

# Nearly all of the time of such a test is XLA's, which compiles faster what it does not optimise.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
