import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from benchmarks import gpu_plan
from benchmarks.hlo import Kernel, kernels_of
from clars_optax.norms._rules import _depthwise, _kernel
from clars_optax.norms._rules._geometry import Geometry, Window

# As XLA writes it, shortened.
HLO = """
HloModule jit_f, is_scheduled=true

%some (param_0: bf16[8,100], param_1: s32[], param_2: bf16[1,100]) -> bf16[1,100] {
  %param_0 = bf16[8,100]{1,0} parameter(0), metadata={scheduling_name="param_0"}
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %same = bf16[8,100]{1,0} bitcast(%param_0)
  %row = bf16[1,100]{1,0} dynamic-slice(%same, %param_1, %zero), dynamic_slice_sizes={1,100}
  %param_2 = bf16[1,100]{1,0} parameter(2)
  ROOT %add = bf16[1,100]{1,0} add(%row, %param_2), metadata={op_name="add"}
}

%written (param_0.1: f32[8,100], param_1.1: f32[1,100], param_2.1: s32[]) -> f32[8,100] {
  %param_0.1 = f32[8,100]{1,0} parameter(0)
  %param_1.1 = f32[1,100]{1,0} parameter(1)
  %param_2.1 = s32[] parameter(2)
  ROOT %update = f32[8,100]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1)
}

%body (arg: (s32[], bf16[8,100], bf16[1,100])) -> (s32[], bf16[8,100], bf16[1,100]) {
  %arg = (s32[], bf16[8,100]{1,0}, /*index=2*/bf16[1,100]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%arg), index=0
  %rows = bf16[8,100]{1,0} get-tuple-element(%arg), index=1
  %total = bf16[1,100]{1,0} get-tuple-element(%arg), index=2
  %fusion.1 = bf16[1,100]{1,0} fusion(%rows, %index, %total), kind=kLoop, calls=%some
  ROOT %tuple.1 = (s32[], bf16[8,100]{1,0}, bf16[1,100]{1,0}) tuple(%index, %rows, %fusion.1)
}

%condition (arg.1: (s32[], bf16[8,100], bf16[1,100])) -> pred[] {
  %arg.1 = (s32[], bf16[8,100]{1,0}, bf16[1,100]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main.1 (x: bf16[8,100], w: f32[8,100], row: f32[1,100], i: s32[]) -> f32[8,100] {
  %x = bf16[8,100]{1,0} parameter(0), sharding={replicated}
  %w = f32[8,100]{1,0} parameter(1)
  %row = f32[1,100]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %gemm = (f32[100,100]{1,0}, s8[4000]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  %start = (s32[], bf16[8,100]{1,0}, bf16[1,100]{1,0}) tuple(%i, %x, %x)
  %loop = (s32[], bf16[8,100]{1,0}, bf16[1,100]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %fusion.2 = f32[8,100]{1,0} fusion(%w, %row, %i), kind=kLoop, calls=%written
}
"""  # noqa: E501


def test_kernels_and_what_they_move():
    assert kernels_of(HLO) == [
        # An operand is read once, however often it is named; the bytes are for cuBLAS's own use.
        Kernel("gemm", "__cublas$gemm", 1, 4 * 100 * 100 + 2 * 800),
        # One row of eight, an index, the sum so far; the new sum.
        Kernel("fusion.1", "fusion", 8, 3 * 2 * 100 + 4),
        # A row and an index in, the row in place.
        Kernel("fusion.2", "fusion", 1, 2 * 4 * 100 + 4),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be that of a compiled program"),
        (HLO.replace("known", ""), "of unknown length"),
        (HLO.replace(" while(", " conditional("), r"loop \(conditional\) moves is not known"),
    ],
)
def test_what_it_cannot_read(text, message):
    with pytest.raises(ValueError, match=message):
        kernels_of(text)


def test_reads_what_xla_writes():
    x = jnp.ones((100, 200))
    compiled = jax.jit(lambda x: (jnp.sin(x) + 1) * jnp.cos(x)).lower(x).compile()
    assert sum(kernel.total_bytes for kernel in kernels_of(compiled.as_text())) == 2 * x.nbytes


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    def missing(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(SystemExit, match=r"pip install \"jax\[cuda12\]\""):
        gpu_plan.main(["--models", "mlp"])


@pytest.fixture(scope="module")
def h100():
    return gpu_plan.gpu()


@pytest.mark.cuda
def test_table(capsys):
    gpu_plan.main(["--models", "mlp", "--batch-size", "64"])
    machine, *_, plain, exact = capsys.readouterr().out.splitlines()
    assert machine.endswith("compiled for NVIDIA H100 80GB HBM3")
    assert "**mlp**, N=64 | plain" in plain
    memory, traffic, _ = (float(cell) for cell in exact.split("|")[3:-1])
    assert 0.5 < memory < 1.5
    assert 1 <= traffic < 1.5


@pytest.mark.cuda
def test_traffic_is_counted(h100):
    x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    plan = gpu_plan.plan_of(lambda x: jnp.sin(x) * 2, (x,), h100)
    assert (plan.moved_bytes, plan.num_kernels) == (8_000_000, 1)


WINDOW = Window(14, 14, 3, padding=1)
CONV = Geometry(32, 1, 1, (WINDOW, WINDOW), 128, 128, blocks_first=False)
DEPTHWISE = Geometry(32, 96, 1, (WINDOW, WINDOW), 1, 1, blocks_first=False)
COLOURS = Geometry(32, 1, 1, (WINDOW, WINDOW), 3, 32, blocks_first=False, folded=True)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("geometry", [CONV, COLOURS, DEPTHWISE])
def test_kernels_become_machine_code(h100, geometry, dtype):
    x, g = (
        jax.ShapeDtypeStruct((32, 14, 14, geometry.blocks * width), dtype)
        for width in (geometry.inner, geometry.outer)
    )
    gradients = 4 * geometry.entries
    if geometry is DEPTHWISE:
        kernel = _depthwise.gradients_of_groups
        written = _depthwise.Cuts.of(geometry).parts * geometry.groups * gradients
    else:
        kernel = functools.partial(_kernel.weight_gradient_and_squares, scale=1.0, precision=None)
        tiles = _kernel.Tiles.of(geometry, x.dtype.itemsize)
        written = tiles.parts * gradients + 4 * tiles.number * geometry.groups
    plan = gpu_plan.plan_of(functools.partial(kernel, geometry, interpret=False), (x, g), h100)
    read = (x.size + g.size) * x.dtype.itemsize
    # The image of few channels is padded first; sums of programs are written, and read again.
    read += 3 * x.size * x.dtype.itemsize * geometry.folded
    assert plan.moved_bytes <= read + 3 * written
