import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

import clars_optax
from benchmarks import plan
from benchmarks.targets import TARGETS, Target, compiled_for, plan_of
from clars_optax.norms._rules import _depthwise, _depthwise_tpu, _kernel, _kernel_tpu
from clars_optax.norms._rules._geometry import Geometry, Window
from tests.norms.geometries import CHIP_BYTES, GEOMETRIES, draw
from tests.norms.geometries import DEPTHWISE as DEPTHWISE_GEOMETRIES

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


@pytest.mark.parametrize(("device", "extra"), [("h100", "cuda12"), ("v5e", "tpu")])
def test_without_the_compiler_it_says_what_to_install(monkeypatch, device, extra):
    def missing(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(SystemExit, match=rf"pip install \"jax\[{extra}\]\""):
        plan.main(["--models", "mlp", "--device", device])


def test_what_needs_no_memory_has_no_ratio(monkeypatch, capsys):
    plans = iter([{"memory": 0, "cycles": 2e6}, {"memory": 3e6, "cycles": 5e6}])
    monkeypatch.setattr(plan, "plan_of", lambda *args, **options: next(plans))
    monkeypatch.setattr(Target, "devices", lambda target: jax.devices()[:1])
    plan.main(["--models", "mlp", "--device", "v5e", "--batch-size", "2"])
    *_, of_plain, of_exact = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in of_plain.split("|")[3:-1]] == ["0 MB", "2.0 M"]
    assert [cell.strip() for cell in of_exact.split("|")[3:-1]] == ["", "2.50"]


@pytest.mark.cuda
def test_table(capsys):
    plan.main(["--models", "mlp", "--batch-size", "64"])
    machine, *_, of_plain, of_exact = capsys.readouterr().out.splitlines()
    assert machine.endswith("compiled for NVIDIA H100 80GB HBM3")
    assert "**mlp**, N=64 | plain" in of_plain
    memory, traffic, _ = (float(cell) for cell in of_exact.split("|")[3:-1])
    assert 0.5 < memory < 1.5
    assert 1 <= traffic < 1.5


@pytest.mark.cuda
def test_a_batch_that_is_shared_out_costs_each_device_its_share():
    step = clars_optax.value_and_grad_and_norms(
        lambda w, x: jnp.mean(jnp.sum(jnp.tanh(x @ w), axis=(1, 2)))
    )

    def traffic(size, num_devices):
        args = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((128, 256), (size, 196, 128))]
        sharing = {"batch_argnums": [1], "num_devices": num_devices}
        return plan_of(step, args, TARGETS["h100"], **sharing)["traffic"]

    assert traffic(1024, 4) < 1.1 * traffic(256, 1)


@pytest.mark.tpu
@pytest.mark.parametrize(("device", "name"), [("v5e", "TPU v5 lite"), ("v6e", "TPU v6 lite")])
def test_table_for_a_tpu(capsys, device, name):
    plan.main(["--device", device, "--models", "mlp", "--batch-size", "512"])
    machine, *_, of_plain, of_exact = capsys.readouterr().out.splitlines()
    assert machine.endswith(f"compiled for {name}")
    assert "**mlp**, N=512 | plain" in of_plain
    assert 1 <= float(of_exact.split("|")[-2]) < 1.5


@pytest.mark.tpu
@pytest.mark.parametrize(("device", "dtype"), [("v5e", "float32"), ("v6e", "bfloat16")])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_kernels_for_a_tpu_become_machine_code(name, dtype, device):
    geometry = GEOMETRIES[name]
    x, g, _ = draw(geometry, dtype)

    def cycles(precision=None):
        run = functools.partial(
            _kernel_tpu.weight_gradient_and_squares,
            geometry,
            chip_bytes=CHIP_BYTES,
            scale=1.0,
            precision=precision,
            interpret=False,
        )
        return plan_of(run, (x, g), TARGETS[device])["cycles"]

    once, exact = cycles(), cycles(jax.lax.Precision.HIGHEST)
    # In float32, exact products are several for one, unless they wait for memory.
    assert 0 < once <= exact if dtype == "float32" else 0 < once == exact


@pytest.mark.tpu
@pytest.mark.parametrize(("device", "dtype"), [("v5e", "float32"), ("v6e", "bfloat16")])
@pytest.mark.parametrize("name", DEPTHWISE_GEOMETRIES)
def test_depthwise_kernels_for_a_tpu_become_machine_code(name, dtype, device):
    geometry = DEPTHWISE_GEOMETRIES[name]
    run = functools.partial(
        *(_depthwise_tpu.gradients_of_groups, geometry),
        bands=_depthwise_tpu.Bands.of(geometry, jnp.dtype(dtype).itemsize, CHIP_BYTES),
        interpret=False,
    )
    x, g, _ = draw(geometry, dtype)
    compiled = compiled_for(run, (x, g), TARGETS[device])
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.cuda
def test_traffic_is_counted():
    x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    planned = plan_of(lambda x: jnp.sin(x) * 2, (x,), TARGETS["h100"])
    assert (planned["traffic"], planned["kernels"]) == (8_000_000, 1)


WINDOW = Window(14, 14, 3, padding=1)
CONV = Geometry(32, 1, 1, (WINDOW, WINDOW), 128, 128, blocks_first=False)
DEPTHWISE = Geometry(32, 96, 1, (WINDOW, WINDOW), 1, 1, blocks_first=False)
COLOURS = Geometry(32, 1, 1, (WINDOW, WINDOW), 3, 32, blocks_first=False, folded=True)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("geometry", [CONV, COLOURS, DEPTHWISE])
def test_kernels_become_machine_code(geometry, dtype):
    x, g = (
        jax.ShapeDtypeStruct((32, 14, 14, geometry.blocks * width), dtype)
        for width in (geometry.inner, geometry.outer)
    )
    gradients = 4 * geometry.entries
    if geometry is DEPTHWISE:
        kernel = _depthwise.gradients_of_groups
        written = _depthwise.Cuts.of(geometry).parts * geometry.groups * gradients
    else:
        sides = _kernel.Sides.of(geometry, x.dtype.itemsize)
        kernel = functools.partial(
            _kernel.weight_gradient_and_squares, sides=sides, scale=1.0, precision=None
        )
        tiles = _kernel.Tiles.of(geometry, sides)
        written = tiles.parts * gradients + 4 * tiles.number * geometry.groups

    def run(x, g):
        return kernel(geometry, x=x, g=g, interpret=False)

    planned = plan_of(run, (x, g), TARGETS["h100"])
    read = (x.size + g.size) * x.dtype.itemsize
    # The image of few channels is padded first; sums of programs are written, and read again.
    read += 3 * x.size * x.dtype.itemsize * geometry.folded
    assert planned["traffic"] <= read + 3 * written
