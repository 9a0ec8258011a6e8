"""The kernels for TPUs: in Pallas's interpreter, and as TPUs would get them."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

import clars_optax
from clars_optax.norms import _one_batch, _taps, _trials
from clars_optax.norms._rules import (
    Platform,
    _depthwise_tpu,
    _fused_tpu,
    _kernel_tpu,
    _trial,
    platform,
)
from clars_optax.norms._rules._blocks import SIDE, Blocks
from clars_optax.norms._rules._depthwise_tpu import Bands
from clars_optax.norms._rules._geometry import Geometry, Window
from tests.norms.geometries import CHIP_BYTES, DEPTHWISE, GEOMETRIES, draw, pixels_met
from tests.norms.interpreted import assert_same, conv, interpret

INTERPRETED = Platform(
    *(0.0, 1.0, 2**20),
    kernel_factor=0.0,
    makes_all=True,
    kernels="tpu",
    interprets=True,
    chip_bytes=CHIP_BYTES,
)
"""Its operations and all bytes are free there, so that it is chosen wherever it can be."""

# Words of one entry, and of two.
DEPTHWISE_KINDS = [("channels inside", "float32"), *((name, "bfloat16") for name in DEPTHWISE)]


def rows_of(runs):
    """The rows that runs inside each other copy, and where they copy them to."""
    pairs = [(0, 0)]
    for run in runs:
        steps = range(run.number)
        pairs = [
            (a + run.source + k * run.source_step, b + run.target + k * run.target_step)
            for a, b in pairs
            for k in steps
        ]
    return pairs


window = st.builds(
    Window,
    pixels=st.integers(1, 9),
    positions=st.integers(1, 9),
    taps=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    padding=st.integers(-2, 4),
    spread=st.integers(1, 3),
)


@hypothesis.given(st.lists(window, min_size=1, max_size=2), st.integers(1, 3))
def test_every_use_meets_its_pixel(windows, images):
    geometry = Geometry(SIDE, 1, images, tuple(windows), 8, 8, blocks_first=False)
    blocks = Blocks.of(geometry, 4, CHIP_BYTES)
    pixels = np.full(blocks.image_rows, -1)
    for runs in blocks.image_runs:
        for source, target in rows_of(runs):
            assert pixels[target] == -1
            pixels[target] = source
    (runs,) = blocks.cotangent_runs
    uses, rows = zip(*rows_of(runs), strict=True)
    assert uses == tuple(range(geometry.uses))
    assert max(rows) < blocks.cotangent_rows == blocks.chunks * blocks.chunk
    assert max(blocks.offsets) + blocks.cotangent_rows <= blocks.image_rows
    found = pixels[np.array(blocks.offsets)[:, None] + np.array(rows)]
    np.testing.assert_array_equal(found, pixels_met(geometry))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # Words of one group, and of two.
        ("same", "float32"),
        ("no positions", "float32"),
        ("no positions, chunks", "float32"),
        *((name, "bfloat16") for name in GEOMETRIES),
    ],
)
def test_finds_gradient_and_norms(name, dtype):
    geometry = GEOMETRIES[name]
    x, g, gradients = draw(geometry, dtype)
    total, squares = _kernel_tpu.weight_gradient_and_squares(
        *(geometry, x, g),
        chip_bytes=CHIP_BYTES,
        scale=0.5,
        precision=None,
        interpret=True,
    )
    np.testing.assert_array_equal(total[0], gradients.sum(0))
    np.testing.assert_allclose(squares, np.sum((0.5 * gradients) ** 2, axis=(1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("chip_bytes", [CHIP_BYTES, None])
@pytest.mark.parametrize(("name", "dtype"), DEPTHWISE_KINDS)
def test_finds_gradients_of_depthwise_kernels(name, dtype, chip_bytes):
    geometry = DEPTHWISE[name]
    itemsize = jnp.dtype(dtype).itemsize
    bands = Bands.of(geometry, itemsize, CHIP_BYTES)
    assert bands.number == 1
    if chip_bytes is None:
        # Less than that, by a byte.
        bands = Bands.of(geometry, itemsize, bands.bytes - 1)
        if len(geometry.windows) == 1:
            assert bands is None
            return
        assert bands.number > 1
    x, g, gradients = draw(geometry, dtype)
    (found,) = _depthwise_tpu.gradients_of_groups(geometry, x, g, bands=bands, interpret=True)
    np.testing.assert_array_equal(found, gradients)


@hypothesis.given(
    st.lists(window.filter(lambda one: one.spread == 1), min_size=2, max_size=2),
    st.integers(1, 9),
)
def test_every_band_has_the_pixels_that_it_meets(windows, number):
    row = windows[0]
    bands = Bands(*windows, 4, False, min(number, row.positions))
    for step in range(bands.number):
        first = int(bands.first_pixel(step))
        assert 0 <= first <= row.pixels - bands.pixels
        for position in range(step * bands.positions, (step + 1) * bands.positions):
            for tap in range(row.taps):
                pixel = row.pixel(position, tap)
                is_met = position < row.positions and 0 <= pixel < row.pixels
                assert not is_met or first <= pixel < first + bands.pixels


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the kernels run in the interpreter, wherever they can."""
    for module in (_one_batch, _taps):
        monkeypatch.setattr(module, "platform", lambda: INTERPRETED)


def small_network(params, x):
    """Convolutions with normalisation between them, and a loop of layers."""
    h = conv(x, params["stem"], window_strides=(2, 2))
    h = jnp.tanh((h - h.mean((0, 1, 2))) / (h.std((0, 1, 2)) + 0.1))
    h = jnp.tanh(conv(h, params["depthwise"], feature_group_count=4))
    h = conv(h, params["pixels"]).mean((1, 2))[:, None] * h.reshape(len(h), -1, 4)
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"])
    return jnp.mean(jnp.sum(jnp.square(h), axis=(1, 2)))


@pytest.fixture
def problem():
    """Its parameters, and a batch."""
    shapes = {
        "stem": (3, 3, 16, 4),
        "depthwise": (3, 3, 1, 4),
        "pixels": (1, 1, 4, 4),
        "layers": (2, 4, 4),
    }
    keys = iter(jax.random.split(jax.random.key(0), 5))
    params = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    return params, jax.random.normal(next(keys), (8, 4, 4, 16))


def calls_in(step, *args):
    """How many kernels for products a program has, and how many depthwise ones."""
    text = str(jax.make_jaxpr(step)(*args))
    return text.count("name=weight_gradient_and_norms"), text.count("name=depthwise_gradients")


@pytest.mark.parametrize("options", [{}, {"group_size": 2}])
def test_norms_of_a_network_are_those_of_the_generic_way(problem, request, options):
    generic = clars_optax.value_and_grad_and_norms(small_network, method="generic", **options)
    expected = jax.jit(generic)(*problem)
    request.getfixturevalue("interpreted")
    step = clars_optax.value_and_grad_and_norms(small_network, **options)
    assert_same(jax.jit(step)(*problem), expected)
    products, depthwise = calls_in(step, *problem)
    assert products >= 3
    assert depthwise >= 1


def test_every_device_of_pmap_has_its_own(problem, request):
    params, x = problem
    step = clars_optax.value_and_grad_and_norms(small_network)
    expected = jax.jit(jax.vmap(step, in_axes=(None, 0)))(params, x.reshape(2, 4, *x.shape[1:]))
    request.getfixturevalue("interpreted")
    mapped = jax.pmap(step, in_axes=(None, 0))
    assert_same(mapped(params, x.reshape(2, 4, *x.shape[1:])), expected)


def test_others_take_its_place_for_derivatives(problem, request):
    def of_norms(params, x):
        return sum(map(jnp.sum, jax.tree.leaves(step(params, x)[2])))

    step = clars_optax.value_and_grad_and_norms(small_network)
    expected = jax.jit(jax.grad(of_norms))(*problem)
    request.getfixturevalue("interpreted")
    assert_same(jax.jit(jax.grad(lambda *args: of_norms(*args)))(*problem), expected)


def lowered_for_a_tpu(function, *arrays):
    """What a TPU would get, on a machine that has none."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    v5e = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=v5e)):
        traced = jax.jit(function).trace(*shapes)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", ["same", "strided, two images", "chunks", "no positions, chunks"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", jax.lax.Precision.HIGHEST), ("bfloat16", None)]
)
def test_compiles_to_what_a_tpu_takes(name, dtype, precision):
    run = functools.partial(
        _kernel_tpu.weight_gradient_and_squares,
        GEOMETRIES[name],
        chip_bytes=CHIP_BYTES,
        scale=0.5,
        precision=precision,
        interpret=False,
    )
    x, g, _ = draw(GEOMETRIES[name], dtype)
    assert lowered_for_a_tpu(run, x, g).count("tpu_custom_call") == 1
    lead = jax.vmap(run), x[None], g[None]
    assert lowered_for_a_tpu(*lead).count("tpu_custom_call") == 1


@pytest.mark.parametrize(("name", "dtype"), DEPTHWISE_KINDS)
def test_depthwise_kernels_compile_to_what_a_tpu_takes(name, dtype):
    geometry = DEPTHWISE[name]
    run = functools.partial(
        *(_depthwise_tpu.gradients_of_groups, geometry),
        bands=Bands.of(geometry, jnp.dtype(dtype).itemsize, CHIP_BYTES),
        interpret=False,
    )
    x, g, _ = draw(geometry, dtype)
    assert lowered_for_a_tpu(run, x, g).count("tpu_custom_call") == 1
    lead = jax.vmap(run), x[None], g[None]
    assert lowered_for_a_tpu(*lead).count("tpu_custom_call") == 1


def test_compiles_inside_of_shard_map(problem, monkeypatch):
    for module in (_one_batch, _taps, _trials):
        monkeypatch.setattr(
            module, "platform", lambda: dataclasses.replace(INTERPRETED, interprets=False)
        )
    monkeypatch.setattr(_fused_tpu, "is_right", lambda *_: True)
    step = clars_optax.value_and_grad_and_norms(small_network)

    def on_each(params, x):
        params = jax.lax.pcast(params, "batch", to="varying")
        value, grads, norms = step(params, x)
        return jax.lax.pmean((value, grads), "batch"), norms

    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    here, everywhere = PartitionSpec("batch"), PartitionSpec()
    mapped = jax.shard_map(
        on_each, mesh=mesh, in_specs=(everywhere, here), out_specs=(everywhere, here)
    )
    text = jax.jit(mapped).trace(*problem).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 4


@pytest.mark.parametrize(
    ("changes", "dtype", "precision"),
    [
        ({"blocks": 2}, "float32", None),
        ({"folded": True}, "float32", None),
        ({}, "float16", None),
        ({}, "float32", jax.lax.Precision.HIGH),
        ({"windows": (Window(10**5, 10**5, 1),)}, "float32", None),  # not on the chip at once
        ({"windows": (), "images": 1021 * 1031}, "float32", None),  # in no number of equal chunks
    ],
)
def test_leaves_the_rest_to_others(changes, dtype, precision):
    geometry = Geometry(8, 1, 1, (Window(4, 4, 1),), 8, 8, False)
    x = jax.ShapeDtypeStruct((8, 4, 8), dtype)

    def ways(geometry):
        return _fused_tpu.fused_on_tpu(
            *(geometry, x, x, 1.0, lambda total: total),
            precision=precision,
            device=INTERPRETED,
            direct=lambda x, g: None,
        )

    assert not ways(dataclasses.replace(geometry, **changes))


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"outer": 2}, "float32"),
        ({}, "float16"),
        ({"windows": (Window(2, 3, 1, spread=2),)}, "float32"),
        ({"windows": (Window(4, 4, 1),) * 3}, "float32"),
        ({"windows": (Window(10**5, 10**5, 1),)}, "float32"),  # not on the chip at once
    ],
)
def test_leaves_other_depthwise_kernels_to_others(changes, dtype):
    geometry = Geometry(8, 8, 1, (Window(4, 4, 1),), 1, 1, False)
    x = jnp.zeros((8, 4, 8), dtype)

    def ways(geometry):
        return _fused_tpu.fused_depthwise_on_tpu(
            *(geometry, x, x, 1.0, lambda total: total),
            device=INTERPRETED,
            direct=lambda x, g: None,
        )

    assert len(ways(geometry)) == (dtype == "float32")
    assert not ways(dataclasses.replace(geometry, **changes))


KERNELS = [
    (_kernel_tpu, "weight_gradient_and_squares"),
    (_depthwise_tpu, "gradients_of_groups"),
]


@pytest.fixture
def trial(monkeypatch):
    """Lets the trials run in the interpreter, with what is done to their results."""
    _trial._error_of.cache_clear()
    yield functools.partial(interpret, monkeypatch, KERNELS)
    _trial._error_of.cache_clear()


@pytest.mark.parametrize("name", ["transposed", "pixels of a stride", "no positions"])
def test_trial_passes_where_it_is_right(trial, name):
    trial()
    kind = _trial.try_on_tpu, GEOMETRIES[name], "bfloat16", None, CHIP_BYTES
    assert _trial._error_of(*kind) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda total, squares: (total.at[0, 0, 0, 0].add(1), squares),
        lambda total, squares: (total, squares.at[-1].mul(1.01)),
    ],
)
def test_trial_finds_what_is_wrong(trial, change):
    trial(change)
    kind = _trial.try_on_tpu, GEOMETRIES["transposed"], "bfloat16", None, CHIP_BYTES
    assert "in bfloat16 are wrong" in _trial._error_of(*kind)


def depthwise_kind(name):
    """What a trial is asked for."""
    geometry = DEPTHWISE[name]
    bands = Bands.of(geometry, 2, CHIP_BYTES)
    few = _fused_tpu._few_registers(geometry, bands)
    return _trial.try_depthwise_on_tpu, few, "bfloat16", bands


@pytest.mark.parametrize("name", ["examples inside", "dilated, two images"])
def test_trial_of_depthwise_kernels_passes_where_they_are_right(trial, name):
    trial()
    assert _trial._error_of(*depthwise_kind(name)) is None


def test_trial_of_depthwise_kernels_finds_what_is_wrong(trial):
    trial(lambda gradients: (gradients.at[-1, -1, -1].add(1),))
    assert "in bfloat16 are wrong" in _trial._error_of(*depthwise_kind("one dimension"))


def test_needs_a_tpu_that_pallas_knows_and_a_program_for_one(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    # Eight devices, among which the compiler shares out the program.
    assert platform().kernels == "none"
    seen = []
    jax.pmap(lambda x: (seen.append(platform().kernels), x)[1])(jnp.zeros(2))
    assert set(seen) == {"tpu"}
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert (platform().kernels, platform().chip_bytes) == ("tpu", 0)
    v5e = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=v5e)):
        assert platform().chip_bytes == 2**26
    monkeypatch.setenv("CLARS_OPTAX_KERNEL", "off")
    assert platform().kernels == "none"
