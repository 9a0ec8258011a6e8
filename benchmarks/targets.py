"""Devices to compile for on a machine that has none of them, and what the compiler says then."""

import atexit
import dataclasses
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import schedule
from benchmarks.hlo import cycles_of, kernels_of
from clars_optax.norms._rules import _fused, _fused_tpu

# From XLA's `xla/tools/hlo_opt/gpu_specs`, with the versions that are current.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# What the TPU's compiler would otherwise ask the machine for, or lock.
_TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# With fewer of them, an image is laid out otherwise.
_CHANNELS = 16

Plan = dict[str, float]
"""What a program would do: by column of the table, bytes or numbers."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device to compile for.

    Attributes:
        backend: what JAX calls its platform.
        package: what has the compiler.
        topology: gives the devices.
        options: for the compiler.
        read: what there is to say of a compiled program.
        price: what of it is the price.
        image_layout: the axes of images as convolutions leave them, the outermost first, where that
            is not their order.
    """

    backend: str
    package: str
    topology: Callable[[], Any]
    options: dict[str, Any]
    read: Callable[[Any], Plan]
    price: str
    image_layout: tuple[int, ...] | None = None

    def devices(self) -> list[Any]:
        """The devices, as many as hang together.

        Raises:
            RuntimeError: the compiler is not installed.
        """
        # The plugins ask for a device unless JAX is told to do without.
        jax.config.update("jax_platforms", "cpu")
        # What they compile without a device cannot be read from a cache.
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            return list(self.topology().devices)
        except (NotImplementedError, RuntimeError) as error:
            raise RuntimeError(
                f'This needs JAX\'s compiler, though no device: pip install "{self.package}" '
                f"({error})"
            ) from error

    def devices_or_exit(self) -> list[Any]:
        """The devices, for a command, which ends with the error's message where there are none."""
        try:
            return self.devices()
        except RuntimeError as error:
            sys.exit(str(error))

    @contextmanager
    def pretended(self, num_devices: int = 1) -> Iterator[None]:
        """Lets the library choose its ways for such devices; its kernels cannot be tried out."""
        with (
            mock.patch.object(jax, "default_backend", return_value=self.backend),
            mock.patch.object(jax, "device_count", return_value=num_devices),
            mock.patch.object(_fused, "is_right", return_value=True),
            mock.patch.object(_fused_tpu, "is_right", return_value=True),
        ):
            yield


def plan_of(
    function: Callable[..., Any], args: Sequence[Any], target: Target, **options: Any
) -> Plan:
    """Compiles a function, and says what it would do; arguments as those of `compiled_for`."""
    return target.read(compiled_for(function, args, target, **options))


def compiled_for(
    function: Callable[..., Any],
    args: Sequence[Any],
    target: Target,
    *,
    batch_argnums: Sequence[int] = (),
    num_devices: int = 1,
    is_image: bool = False,
) -> Any:
    """Compiles a function.

    Args:
        function: takes the arguments.
        args: arrays, or types of arrays.
        target: the kind of device.
        batch_argnums: positions of the arguments that are shared out among the devices.
        num_devices: the numbers are those of one of so many.
        is_image: whether arguments of four axes are images `[N, H, W, C]`, to be laid out as the
            target's own convolutions leave them.
    """
    mesh = Mesh(target.devices()[:num_devices], ("device",))

    def placed(position: int, x: Any) -> Any:
        is_batch = position in batch_argnums
        where: Any = NamedSharding(mesh, PartitionSpec("device" if is_batch else None))
        if is_image and target.image_layout and x.ndim == 4 and x.shape[-1] >= _CHANNELS:
            where = Format(Layout(target.image_layout), where)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    types = [
        jax.tree.map(functools.partial(placed, position), arg) for position, arg in enumerate(args)
    ]
    with target.pretended(num_devices), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*types).compile(compiler_options=target.options)


def _read_gpu(compiled: Any) -> Plan:
    kernels = kernels_of(str(compiled.as_text()))
    return {
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "traffic": sum(kernel.total_bytes for kernel in kernels),
        "kernels": sum(kernel.times for kernel in kernels),
    }


def _read_tpu(bytes_per_cycle: float, compiled: Any) -> Plan:
    schedules = {}
    for path in _schedules().glob("*-final_bundles.txt"):
        if match := _SCHEDULE.match(path.name):
            schedules[match[1]] = path.read_text()
        path.unlink()

    def cycles_of_kernel(names: Sequence[str], moved: int) -> float:
        # It is compiled once.
        text = next((schedules[name] for name in names if name in schedules), None)
        if text is None:
            raise RuntimeError(
                f"The compiler wrote no schedule of the kernel {names[0]}: it was loaded before it "
                "was told to. Start this as a program of its own."
            )
        return max(schedule.cycles_of_kernel(text), moved / bytes_per_cycle)

    return {
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "cycles": cycles_of(str(compiled.as_text()), cycles_of_kernel),
    }


# A number, the kernel's name, and another number.
_SCHEDULE = re.compile(r"\d+-([\w.]+)-\d+-final_bundles")


@functools.cache
def _schedules() -> Path:
    """The folder into which the TPU's compiler writes the schedules of kernels."""
    folder = Path(tempfile.mkdtemp(prefix="clars_optax_schedules_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _gpu() -> Any:
    return topologies.get_topology_desc(
        "h100", platform="cuda", target_config=_H100, topology="1x1x8"
    )


def _tpu(name: str) -> Any:
    for variable, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if str(_schedules()) not in os.environ.get("LIBTPU_INIT_ARGS", ""):
        # It reads that once, when it is loaded.
        options = f"--xla_jf_dump_to={_schedules()} --xla_jf_dump_llo_text=true"
        options += " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {options}"
    return topologies.get_topology_desc(name, platform="tpu")


def _tpu_target(topology: str, bytes_per_cycle: float) -> Target:
    devices = functools.partial(_tpu, topology)
    read = functools.partial(_read_tpu, bytes_per_cycle)
    return Target("tpu", "jax[tpu]", devices, {}, read, "cycles", image_layout=(1, 2, 0, 3))


TARGETS: dict[str, Target] = {
    "h100": Target(
        "gpu",
        "jax[cuda12]",
        _gpu,
        # Where there is no GPU to try them on, XLA cannot choose among its products and cuBLAS's.
        {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0},
        _read_gpu,
        "traffic",
    ),
    # At 819 and 1,640 GB/s, 1.5 and 1.75 GHz.
    "v5e": _tpu_target("v5e:2x2", 546),
    "v6e": _tpu_target("v6e:2x2", 937),
}
"""By name, the kinds of devices."""
