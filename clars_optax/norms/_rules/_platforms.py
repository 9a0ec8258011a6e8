"""What costs how much on which kind of device: one table."""

import dataclasses

import jax

from clars_optax.norms._rules._trial import can_run
from clars_optax.norms._rules._ways import Platform

_PLATFORMS = {
    # Measured, two cores with AVX-512. What is made at a time stays in the cache.
    "cpu": Platform(8.0, 3.0, 2 * 2**20),
    # Fits what layers of ResNet-50 took on an H200, bfloat16: weight gradients at 450 TFLOP/s and
    # 3.75 TB/s, kernels at 4.9 TB/s from the cache. Few large steps keep such a device busy.
    "gpu": Platform(
        *(120.0, 2.0, 256 * 2**20), kernel_factor=1.5, cache_factor=1.3, splits_sums=True
    ),
    # Fits what XLA's compiler says of a v5e, bfloat16; not measured. Single gradients stay on the
    # chip, mostly; what is put together from shifted copies goes through its memory many times.
    "tpu": Platform(
        *(230.0, 2.0, 2**30),
        reread_factor=3.5,
        unfold_factor=8.0,
        vector_factor=57.0,
        makes_all=True,
    ),
}


def platform() -> Platform:
    """The kind of device that programs run on by default."""
    kind = _PLATFORMS.get(jax.default_backend(), _PLATFORMS["gpu"])
    if not can_run():
        return kind
    if jax.default_backend() == "tpu":
        return dataclasses.replace(kind, kernels="tpu", chip_bytes=_chip_bytes())
    # A kernel reads operands once. Without one all ways copy them, and by XLA's plan for an H100
    # those that are chosen as if copies were free move less.
    return dataclasses.replace(kind, kernels="gpu", reread_factor=1.0, makes_all=True)


def _chip_bytes() -> int:
    """How much of what a TPU has on the chip a step of a kernel may take: half of it."""
    from jax.experimental.pallas import tpu

    try:
        return tpu.get_tpu_info().vmem_capacity_bytes // 2
    except ValueError:
        # A kind of TPU that Pallas does not know: there, XLA does the work.
        return 0
