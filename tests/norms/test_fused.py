"""The kernel: in Pallas's interpreter, as a way among others, and as GPUs would get it.

`test_rules.py` has it among all ways of all products and convolutions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import clars_optax
from clars_optax.norms import _taps
from clars_optax.norms._rules import Platform, _fused, _kernel, find_rule, platform

# Its operations and all bytes are free there, so that it is chosen wherever it can be.
INTERPRETED = Platform(0.0, 1.0, 2**20, kernel_factor=0.0, kernels="interpreted")

DENSE = {"dimension_numbers": (((2,), (0,)), ((), ())), "precision": None}


@pytest.mark.parametrize(
    ("num_groups", "programs", "parts"),
    [(1, 99, 1), (7, 9, 3), (5, 13, 4)],  # the last of three has one group, of four has none
)
def test_many_tiles_steps_and_parts(monkeypatch, num_groups, programs, parts):
    monkeypatch.setattr(_kernel, "_PROGRAMS", programs)
    # Two tiles by two, and three steps, none of which is full.
    geometry = _kernel.Geometry(num_groups, 1, 70, (), 70, 130, blocks_first=True)
    tiles = _kernel.Tiles.of(geometry, itemsize=4)
    assert (tiles.row_tiles, tiles.column_tiles, tiles.parts) == (2, 2, parts)
    assert 2 * tiles.uses < geometry.uses < 3 * tiles.uses
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(num_groups, 70, width)) for width in (70, 130))
    rows = np.einsum("gti,gto->gio", x, g)
    rule = find_rule("dot_general", DENSE, [x.shape, (70, 130), g.shape], 1)
    arrays = [jnp.asarray(z[:, None, None], jnp.float32) for z in (x, g)]
    squares, gradient = rule.ways(*arrays, 0.5, INTERPRETED)[-1].run()
    np.testing.assert_allclose(squares, np.sum((0.5 * rows) ** 2, axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(gradient, rows.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spread", [1, 2])
def test_compiles_to_what_triton_takes(dtype, spread):
    window = _kernel.Window(9, 5 * spread, 3, 3 - spread, 1, 1, spread)
    geometry = _kernel.Geometry(6, 2, 3, (window, window), 20, 24, blocks_first=False)
    run = functools.partial(
        _kernel.weight_gradient_and_squares, geometry, scale=2.0, precision=None, interpret=False
    )
    shapes = (6, 3, 9, 9, 40), (6, 3, 5 * spread, 5 * spread, 48)
    traced = jax.jit(run).trace(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text
    assert "weight_gradient_and_norms" in text


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(_taps, "platform", lambda: INTERPRETED)


def conv(x, w, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def network(params, x):
    """Convolutions with normalisation between them, attention's products, and a loop of layers."""
    h = conv(x, params["stem"], window_strides=(2, 2))
    h = jnp.tanh((h - h.mean((0, 1, 2))) / (h.std((0, 1, 2)) + 0.1))
    h = jax.checkpoint(functools.partial(conv, feature_group_count=2))(h, params["groups"])
    h = jnp.tanh(h).reshape(len(h), -1, h.shape[-1])
    h = jnp.einsum("ntd,dhk->nthk", h, params["heads"]).reshape(*h.shape[:2], -1)

    def layer(h, w):
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(layer, h, params["layers"])
    return jnp.mean(jnp.sum(jnp.square(h @ params["out"]), axis=(1, 2)))


@pytest.fixture
def problem():
    shapes = {
        "stem": (3, 3, 2, 4),
        "groups": (3, 3, 2, 6),
        "heads": (6, 2, 3),
        "layers": (2, 6, 6),
        "out": (6, 3),
    }
    keys = iter(jax.random.split(jax.random.key(0), 6))
    params = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    return params, jax.random.normal(next(keys), (8, 6, 6, 2))


def assert_same(found, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(
    "options", [{}, {"group_size": 2, "num_norm_examples": 4}, {"microbatch_size": 4}]
)
def test_norms_are_those_of_the_generic_way(interpreted, problem, options):
    step, generic = (
        jax.jit(clars_optax.value_and_grad_and_norms(network, method=method, **options))
        for method in ("auto", "generic")
    )
    calls = str(jax.make_jaxpr(step)(*problem)).count("pallas_call[")
    # One for each parameter, in each of two micro-batches, which a CPU has one after the other.
    assert calls == (10 if "microbatch_size" in options else 5)
    assert_same(step(*problem), generic(*problem))


def test_mapped_over_devices_and_parameters(interpreted):
    def loss_fn(w, x):
        return jnp.mean(jnp.sum(jnp.tanh(x @ w), axis=(1, 2)))

    step, generic = (
        clars_optax.value_and_grad_and_norms(loss_fn, method=method)
        for method in ("auto", "generic")
    )
    keys = jax.random.split(jax.random.key(0))
    w, x = jax.random.normal(keys[0], (5, 6)), jax.random.normal(keys[1], (4, 3, 5))
    assert_same(*(jax.vmap(f, (0, None))(jnp.stack([w, -w]), x) for f in (step, generic)))
    shares = x.reshape(2, 2, 3, 5)
    assert_same(*(jax.pmap(f, in_axes=(None, 0))(w, shares) for f in (step, generic)))

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    data, everywhere = PartitionSpec("data"), PartitionSpec()

    def on_mesh(f):
        def share(w, x):
            value, grads, norms = f(jax.lax.pcast(w, "data", to="varying"), x)
            return *jax.lax.pmean((value, grads), "data"), norms

        out_specs = (everywhere, everywhere, data)
        return jax.shard_map(share, mesh=mesh, in_specs=(everywhere, data), out_specs=out_specs)

    assert_same(*(jax.jit(on_mesh(f))(w, x) for f in (step, generic)))


@pytest.mark.parametrize(
    ("dtypes", "size"), [((jnp.int32, jnp.float32), 4), ((jnp.bfloat16, jnp.bfloat16), 2**31)]
)
def test_is_no_way_for_arrays_that_it_cannot_take(dtypes, size):
    # Types alone: two thousand million entries would not fit into memory.
    x, g = (jax.ShapeDtypeStruct((size,), dtype) for dtype in dtypes)
    geometry = _kernel.Geometry(size, 1, 1, (), 1, 1, blocks_first=True)
    assert not _fused.fused(geometry, x, g, 1.0, jnp.sin, precision=None, device=INTERPRETED)


def test_where_it_does_not_run_that_is_said_once():
    _fused._works.cache_clear()
    with pytest.warns(RuntimeWarning, match="not run on this GPU, so XLA computes .* interpret"):
        assert not _fused._works()
    assert not _fused._works()  # a second warning would be an error


def test_needs_a_gpu_that_is_not_shared_out_by_the_compiler(monkeypatch):
    assert platform().kernels == "none"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_fused, "_works", lambda: True)
    assert platform().kernels == "none"  # there are eight devices
    seen = []
    jax.pmap(lambda x: (seen.append(platform().kernels), x)[1])(jnp.zeros(2))
    assert set(seen) == {"compiled"}
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert platform().kernels == "compiled"
