"""What XLA plans for a GPU, on a machine that has none: memory, traffic and kernels.

`python -m benchmarks.gpu_plan` prints one table; `benchmarks/README.md` says what is in it.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.hlo import kernels_of
from benchmarks.models import MODELS, PRESETS, problem_of
from benchmarks.report import machine, table
from benchmarks.variants import VARIANTS, plain
from clars_optax.norms._rules import _fused

# From XLA's `xla/tools/hlo_opt/gpu_specs`, with the versions that are current.
H100 = """
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

# Where there is no GPU to try them on, XLA cannot choose among its own products and cuBLAS's.
_OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """What a program would do on a GPU.

    Attributes:
        temp_bytes: peak of the temporary memory, which is neither arguments nor results.
        moved_bytes: what all kernels read and write.
        num_kernels: how often a kernel is started.
    """

    temp_bytes: int
    moved_bytes: int
    num_kernels: int

    def cells(self, base: "GpuPlan | None" = None) -> tuple[str, str, str]:
        """The numbers, or their ratios to those of another program."""
        if base is None:
            megabytes = f"{self.temp_bytes / 1e6:,.0f} MB"
            return megabytes, f"{self.moved_bytes / 1e9:.1f} GB", f"{self.num_kernels:,}"
        return (
            f"{self.temp_bytes / base.temp_bytes:.2f}",
            f"{self.moved_bytes / base.moved_bytes:.2f}",
            f"{self.num_kernels / base.num_kernels:.2f}",
        )


def gpu() -> Mesh:
    """An H100 to compile for.

    Raises:
        RuntimeError: JAX's plugin for CUDA is not installed.
    """
    try:
        topology = topologies.get_topology_desc(
            "h100", platform="cuda", target_config=H100, topology="1x1x1"
        )
    except NotImplementedError as error:
        raise RuntimeError(
            'This needs JAX\'s compiler for GPUs, though no GPU: pip install "jax[cuda12]"'
        ) from error
    return topologies.make_mesh(topology, (1,), ("device",))


def plan_of(function: Callable[..., Any], args: tuple[Any, ...], mesh: Mesh) -> GpuPlan:
    """Compiles a function for a GPU.

    Args:
        function: takes the arguments.
        args: arrays, or types of arrays.
        mesh: the GPU.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    types = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), args
    )
    with _as_if_there_were_a_gpu(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(function).lower(*types).compile(compiler_options=_OPTIONS)
    memory: Any = compiled.memory_analysis()
    kernels = kernels_of(str(compiled.as_text()))
    return GpuPlan(
        memory.temp_size_in_bytes,
        sum(kernel.total_bytes for kernel in kernels),
        sum(kernel.times for kernel in kernels),
    )


@contextmanager
def _as_if_there_were_a_gpu() -> Iterator[None]:
    """Lets the library choose its ways for a GPU; its kernels cannot be tried out."""
    with (
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.object(jax, "device_count", return_value=1),
        mock.patch.object(_fused, "is_right", return_value=True),
    ):
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    # The plugin asks for a GPU unless JAX is told to do without.
    jax.config.update("jax_platforms", "cpu")
    try:
        mesh = gpu()
    except RuntimeError as error:
        sys.exit(str(error))
    lines: list[tuple[str, ...]] = []
    for name in options.models:
        problem = problem_of(name, options.batch_size)
        print(f"{name} ...", file=sys.stderr, flush=True)
        base = plan_of(plain(problem), problem.args, mesh)
        lines.append((f"**{name}**, N={problem.batch_size}", "plain", *base.cells()))
        for variant in options.variants:
            print(f"{name}: {variant} ...", file=sys.stderr, flush=True)
            plan = plan_of(VARIANTS[variant](problem), problem.args, mesh)
            lines.append(("", variant, *plan.cells(base)))
    print(f"{machine(with_load=False)}; compiled for {mesh.devices.flat[0].device_kind}\n")
    print(table(("model", "variant", "memory", "traffic", "kernels"), lines))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_plan",
        description="Memory and traffic that XLA plans for a GPU, without one.",
    )
    names = PRESETS["gpu"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=names, metavar="NAME")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["exact"], metavar="NAME"
    )
    parser.add_argument("--batch-size", type=int, help="default: the model's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
