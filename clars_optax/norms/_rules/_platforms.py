"""What costs how much on which kind of device: one table."""

import dataclasses

import jax

from clars_optax.norms._rules._trial import can_run
from clars_optax.norms._rules._ways import Platform

_PLATFORMS = {
    # Measured, two cores with AVX-512. What is made at a time stays in the cache.
    "cpu": Platform(8.0, 3.0, 2 * 2**20),
    # From data sheets, bfloat16; not measured. Few large steps keep such a device busy.
    "gpu": Platform(150.0, 2.0, 256 * 2**20, 1.0, kernel_factor=1.5, cache_factor=1.8),
    "tpu": Platform(230.0, 2.0, 64 * 2**20, 1.0),
}


def platform() -> Platform:
    """The kind of device that programs run on by default."""
    kind = _PLATFORMS.get(jax.default_backend(), _PLATFORMS["gpu"])
    return dataclasses.replace(kind, kernels="compiled") if can_run() else kind
