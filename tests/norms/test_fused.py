"""The kernels: in Pallas's interpreter, as ways among others, and as GPUs would get them.

`test_rules.py` has them among all ways of all products and convolutions.
"""

import dataclasses
import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

import clars_optax
from clars_optax.norms import _taps, _trials
from clars_optax.norms._rules import (
    _depthwise,
    _fused,
    _kernel,
    _trial,
    find_rule,
    platform,
)
from clars_optax.norms._rules._geometry import Geometry, Window
from tests.norms.interpreted import INTERPRETED, assert_same, interpret, network

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

DENSE = {"dimension_numbers": (((2,), (0,)), ((), ())), "precision": None}


@pytest.mark.parametrize(
    ("num_groups", "multiprocessors", "parts"),
    [(1, 99, 1), (7, 10, 3), (5, 8, 5)],  # the last of three has one group of seven
)
def test_many_tiles_steps_and_parts(monkeypatch, num_groups, multiprocessors, parts):
    monkeypatch.setattr(_kernel, "MULTIPROCESSORS", multiprocessors)
    # Tiles and steps of which the last ones are not full.
    geometry = Geometry(num_groups, 1, 90, (), 150, 250, blocks_first=True)
    sides = _kernel.Sides.of(geometry, itemsize=4)
    tiles = _kernel.Tiles.of(geometry, sides)
    assert (tiles.row_tiles, tiles.column_tiles, tiles.parts) == (3, 2, parts)
    assert 2 * sides.uses < geometry.uses < 3 * sides.uses
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(num_groups, 90, width)) for width in (150, 250))
    rows = np.einsum("gti,gto->gio", x, g)
    rule = find_rule("dot_general", DENSE, [x.shape, (150, 250), g.shape], 1)
    arrays = [jnp.asarray(z[:, None, None], jnp.float32) for z in (x, g)]
    squares, gradient = rule.ways(*arrays, 0.5, INTERPRETED)[-1].run()
    np.testing.assert_allclose(squares, np.sum((0.5 * rows) ** 2, axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(gradient, rows.sum(0), rtol=1e-4, atol=1e-4)


def windowed(spread=1):
    window = Window(9, 5 * spread, 3, 3 - spread, 1, 1, spread)
    return Geometry(6, 2, 3, (window, window), 20, 24, blocks_first=False)


def lowered_for_cuda(function, *shapes, dtype):
    """What a GPU would get, on a machine that has none."""
    if dtype is not None:
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    # From 0.11 on, JAX wants to know for which GPU.
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        traced = jax.jit(function).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("precision", [None, "highest"])
@pytest.mark.parametrize("spread", [1, 2])
def test_convolutions_compile_to_what_triton_takes(spread, precision, dtype):
    run = functools.partial(
        _kernel.weight_gradient_and_squares,
        windowed(spread),
        sides=_kernel.Sides.of(windowed(spread), jnp.dtype(dtype).itemsize),
        scale=2.0,
        precision=precision and jax.lax.Precision.HIGHEST,
        interpret=False,
    )
    shapes = (6, 3, 9, 9, 40), (6, 3, 5 * spread, 5 * spread, 48)
    for function, lead in ((run, ()), (jax.vmap(run), (2,))):
        text = lowered_for_cuda(function, *((*lead, *shape) for shape in shapes), dtype=dtype)
        assert text.count("xla.gpu.triton") == 1
    assert "weight_gradient_and_norms" in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_of_few_channels_compile_to_what_triton_takes(dtype):
    folded = dataclasses.replace(windowed(2), inner=3, folded=True)
    depthwise = dataclasses.replace(windowed(), inner=1)
    for kernel, name, geometry in (
        (
            functools.partial(
                _kernel.weight_gradient_and_squares,
                folded,
                sides=_kernel.Sides.of(folded, jnp.dtype(dtype).itemsize),
                scale=2.0,
                precision=None,
            ),
            "weight_gradient_and_norms",
            folded,
        ),
        (
            functools.partial(_depthwise.gradients_of_groups, depthwise),
            "depthwise_gradients",
            depthwise,
        ),
    ):
        positions = geometry.windows[0].positions
        shapes = (6, 3, 9, 9, 2 * geometry.inner), (6, 3, positions, positions, 48)
        text = lowered_for_cuda(functools.partial(kernel, interpret=False), *shapes, dtype=dtype)
        assert text.count("xla.gpu.triton") == 1
        assert name in text


@pytest.mark.parametrize(("multiprocessors", "parts"), [(1, 1), (20, 7)])
def test_depthwise_kernels_of_many_channels_taps_and_uses(monkeypatch, multiprocessors, parts):
    monkeypatch.setattr(_depthwise, "MULTIPROCESSORS", multiprocessors)
    # More than a program has, and none of its shares full.
    window = Window(70, 34, 3, stride=2, dilation=2, padding=1)
    geometry = Geometry(3, 35, 1, (window, Window(6, 6, 5, padding=2)), 1, 2, False)
    cuts = _depthwise.Cuts.of(geometry)
    assert (cuts.channel_runs, cuts.tap_runs, cuts.parts) == (2, 2, parts)
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(3, *s)) for s in ((70, 6, 35), (34, 6, 70)))
    padded = np.pad(x, ((0, 0), (1, 3), (2, 2), (0, 0))).repeat(2, axis=-1)
    expected = [
        np.sum(padded[:, 2 * i : 2 * i + 68 : 2, j : j + 6] * g, axis=(1, 2))
        for i in range(3)
        for j in range(5)
    ]
    (found,) = _depthwise.gradients_of_groups(
        geometry, *(jnp.asarray(z, jnp.float32) for z in (x, g)), interpret=True
    )
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("uses", [20, 200])
@pytest.mark.parametrize("option", ["jax_enable_x64", "jax_numpy_dtype_promotion"])
def test_products_compile_whatever_the_options_of_jax(uses, option):
    geometry = Geometry(6, 2, uses, (), 40, 24, blocks_first=True)
    run = functools.partial(
        _kernel.weight_gradient_and_squares,
        geometry,
        sides=_kernel.Sides.of(geometry, itemsize=2),
        scale=2.0,
        precision=None,
        interpret=False,
    )
    before = getattr(jax.config, option)
    jax.config.update(option, True if option == "jax_enable_x64" else "strict")
    try:
        text = lowered_for_cuda(run, (6, 2, uses, 40), (6, 2, uses, 24), dtype=jnp.bfloat16)
    finally:
        jax.config.update(option, before)
    assert "xla.gpu.triton" in text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 2, "num_norm_examples": 4},
        {"microbatch_size": 4},
    ],
)
def test_norms_are_those_of_the_generic_way(interpreted, problem, options):
    step, generic = (
        jax.jit(clars_optax.value_and_grad_and_norms(network, method=method, **options))
        for method in ("auto", "generic")
    )
    calls = str(jax.make_jaxpr(step)(*problem)).count("pallas_call[")
    # One for each parameter, in each of two micro-batches, which a CPU has one after the other.
    assert calls == (12 if "microbatch_size" in options else 6)
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
    ("differs", "takes"),
    [
        ({}, True),
        ({"x": jnp.int32, "g": jnp.int32}, False),
        ({"g": jnp.bfloat16}, False),
        ({"x": jnp.bfloat16, "g": jnp.bfloat16}, True),
        ({"x": jnp.bfloat16, "g": jnp.bfloat16, "inner": 3}, False),
        ({"x": jnp.bfloat16, "g": jnp.bfloat16, "outer": 5}, False),
        ({"uses": 2**29, "outer": 2}, False),
        ({"uses": 2**29, "inner": 2}, False),
        ({"inner": 2**16, "outer": 2**16}, False),
        ({"groups": 2**22, "inner": 2**15, "uses": 1}, True),  # one half after the other
        ({"precision": jax.lax.Precision.HIGHEST}, True),
        ({"precision": (jax.lax.Precision.HIGH,) * 2}, True),
        ({"precision": (jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT)}, False),
        ({"precision": jax.lax.DotAlgorithmPreset.F16_F16_F16}, False),
    ],
)
def test_takes_only_what_it_can(differs, takes):
    case = {"x": jnp.float32, "g": jnp.float32, "groups": 2, "uses": 5, "inner": 4, "outer": 4}
    case |= {"precision": None} | differs
    lead = case["groups"], 1, case["uses"]
    # Types alone: some would not fit into memory.
    x = jax.ShapeDtypeStruct((*lead, case["inner"]), case["x"])
    g = jax.ShapeDtypeStruct((*lead, case["outer"]), case["g"])
    geometry = Geometry(*lead, (), case["inner"], case["outer"], blocks_first=True)

    def ways(x, g):
        found = _fused.fused(
            geometry,
            *(x, g, 1.0, jnp.sin),
            precision=case["precision"],
            device=INTERPRETED,
            direct=lambda x, g: None,
        )
        assert bool(found) == takes

    jax.eval_shape(ways, x, g)


@pytest.mark.parametrize(
    ("positions", "outer", "takes"),
    [(100, 4, True), (100, 5, False), (2**30 - 100, 2, False)],  # the last for its padded image
)
def test_takes_a_few_channels_of_16_bits(positions, outer, takes):
    window = Window(100, positions, 2, padding=positions // 2)
    geometry = Geometry(2, 1, 1, (window,), 3, outer, blocks_first=False, folded=True)

    def ways(x, g):
        found = _fused.fused(
            *(geometry, x, g, 1.0, jnp.sin),
            precision=None,
            device=INTERPRETED,
            direct=lambda x, g: None,
        )
        assert bool(found) == takes

    jax.eval_shape(
        ways,
        jax.ShapeDtypeStruct((2, 1, 100, 3), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 1, positions, outer), jnp.bfloat16),
    )


@pytest.mark.parametrize(
    ("x", "g", "uses", "takes"),
    [
        (jnp.bfloat16, jnp.bfloat16, 5, True),
        (jnp.bfloat16, jnp.float32, 5, False),
        (jnp.float32, jnp.float32, 2**30, False),
    ],
)
def test_takes_depthwise_kernels(x, g, uses, takes):
    geometry = Geometry(2, 3, 1, (Window(uses, uses, 1),), 1, 1, blocks_first=False)

    def ways(x, g):
        found = _fused.fused_depthwise(
            *(geometry, x, g, 1.0, jnp.sin), device=INTERPRETED, direct=lambda x, g: None
        )
        assert bool(found) == takes

    jax.eval_shape(ways, *(jax.ShapeDtypeStruct((2, 1, uses, 3), dtype) for dtype in (x, g)))


def rows_made(size):
    """How many gradients of a parameter that is used twice are made for the norms of two."""

    def loss_fn(w, x):
        return jnp.mean(jnp.sum(jnp.tanh(x @ w) @ w.T, axis=1))

    step = clars_optax.value_and_grad_and_norms(loss_fn, num_norm_examples=2)
    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((size, 7), (16, size)))
    text = str(jax.make_jaxpr(step)(w, x))
    return [count for count in (3, 16) if f"f32[{count},{size},7]" in text]


def test_large_parameters_without_a_rule_keep_some_norms_apart(interpreted):
    assert rows_made(100) == [16]
    # Sixteen of these are more than a device makes at a time.
    assert rows_made(3000) == [3]


def test_on_a_tpu_all_norms_are_made(monkeypatch):
    assert rows_made(100) == [3]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert rows_made(100) == [16]


def test_derivatives_are_those_of_the_other_ways(problem, request):
    params, x = problem

    def derivatives():
        step = clars_optax.value_and_grad_and_norms(network)

        def of_norms(params):
            return sum(map(jnp.sum, jax.tree.leaves(step(params, x)[2])))

        return jax.grad(of_norms)(params), jax.jvp(of_norms, (params,), (params,))[1]

    expected = jax.jit(derivatives)()
    request.getfixturevalue("interpreted")
    assert_same(jax.jit(lambda: derivatives())(), expected)


def compiled(monkeypatch):
    """A GPU's line of the cost model, for a program that runs on a CPU after all."""
    monkeypatch.setattr(
        _taps, "platform", lambda: dataclasses.replace(INTERPRETED, interprets=False)
    )
    monkeypatch.setattr(_fused, "is_right", lambda *_: True)


def test_a_program_for_another_device_goes_another_way(monkeypatch, problem):
    generic = jax.jit(clars_optax.value_and_grad_and_norms(network, method="generic"))
    expected = generic(*problem)
    compiled(monkeypatch)
    step = clars_optax.value_and_grad_and_norms(network)
    assert_same(jax.jit(step)(*problem), expected)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), problem)
    text = lowered_for_cuda(lambda arguments: step(*arguments), shapes, dtype=None)
    assert text.count("xla.gpu.triton") == 6


KERNELS = [(_kernel, "weight_gradient_and_squares"), (_depthwise, "gradients_of_groups")]


@pytest.fixture
def trial(monkeypatch):
    """Lets the trials run in the interpreter, with what is done to their results."""
    # The interpreter takes one program after another.
    monkeypatch.setattr(_kernel, "MULTIPROCESSORS", 4)
    monkeypatch.setattr(_trial, "_NUM_GROUPS", 9)
    monkeypatch.setattr(_trial, "_has_warned", False)
    _trial._error_of.cache_clear()
    yield functools.partial(interpret, monkeypatch, KERNELS)
    _trial._error_of.cache_clear()


PRODUCTS = [
    (_trial.try_products, 16, 32, 16, True, False, "bfloat16", None),
    (_trial.try_products, 16, 32, 64, False, False, "bfloat16", None),
    (_trial.try_products, 32, 16, 16, True, True, "bfloat16", None),
]
DEPTHWISE = (_trial.try_depthwise, 32, 9, "bfloat16")
WIDE_DEPTHWISE = (_trial.try_depthwise, 64, 9, "bfloat16")


@pytest.mark.parametrize("kind", [*PRODUCTS, DEPTHWISE, WIDE_DEPTHWISE])
def test_trial_passes_where_the_kernel_is_right(trial, kind):
    trial()
    assert _trial._error_of(*kind) is None


def test_trial_has_the_kernel_in_question():
    for uses in (*range(1, 200), 577, 784, 3136):
        for side, itemsize, is_folded in itertools.product((8, 64, 128), (2, 4), (False, True)):
            inner = 3 if is_folded else side
            window = Window(uses, uses, side // 2 if is_folded else 1)
            given = Geometry(64, 1, 1, (window,), inner, side, False, folded=is_folded)
            sides = _kernel.Sides.of(given, itemsize)
            is_one_step = _kernel.Tiles.of(given, sides).steps == 1
            geometry = _trial.geometry_of(*sides, is_one_step, is_folded)
            tried = _kernel.Tiles.of(geometry, sides)
            assert (tried.number, tried.steps == 1) == (geometry.matrices, is_one_step)
            # Some programs have several groups.
            assert tried.parts < geometry.groups


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("taps", [1, 5, 9])
def test_trial_has_the_depthwise_kernel_in_question(trial, monkeypatch, taps, channels):
    trial()
    tried = []
    cuts_of = _depthwise.Cuts.of
    monkeypatch.setattr(
        _depthwise.Cuts, "of", lambda geometry: (tried.append(cuts_of(geometry)), tried[-1])[1]
    )
    _trial.try_depthwise(channels, taps, "float32")
    (cuts,) = tried
    assert (cuts.channels, cuts.taps) == (channels, taps)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (PRODUCTS[0], lambda total, squares: (total.at[0, 0, 0, 0].add(1), squares)),
        (PRODUCTS[0], lambda total, squares: (total, squares.at[-1].mul(1.01))),
        (DEPTHWISE, lambda rows: (rows.at[-1, -1, -1].add(1),)),
    ],
)
def test_trial_finds_what_is_wrong(trial, kind, change):
    trial(change)
    assert "in bfloat16 are wrong" in _trial._error_of(*kind)


def test_kernels_of_a_program_are_tried_side_by_side_before_it_is_traced(monkeypatch, problem):
    for module in (_taps, _trials):
        monkeypatch.setattr(
            module, "platform", lambda: dataclasses.replace(INTERPRETED, interprets=False)
        )
    tried = {True: [], False: []}

    def error_of(*kind):
        tried[threading.current_thread() is threading.main_thread()].append(kind)

    with monkeypatch.context() as patch:
        patch.setattr(_trial, "_error_of", error_of)
        jax.make_jaxpr(clars_optax.value_and_grad_and_norms(network))(*problem)
    before, meanwhile = tried[False], tried[True]
    assert {trial for trial, *_ in before} == {_trial.try_products, _trial.try_depthwise}
    assert len(before) == len(set(before))
    # Those inside of a loop and of `jax.checkpoint` are among them.
    assert set(meanwhile) == set(before)


def test_where_it_does_not_run_that_is_said_once(trial):
    del trial  # the kernel itself, on a CPU
    with pytest.warns(RuntimeWarning, match="not run on this device, so XLA computes .* interpret"):
        assert not _trial.is_right(*PRODUCTS[0])
    # A second warning would be an error.
    assert not _trial.is_right(*PRODUCTS[0])
    assert not _trial.is_right(*DEPTHWISE)


def test_needs_a_gpu_and_a_program_that_is_shared_out_in_one_way(monkeypatch):
    assert platform().kernels == "none"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert platform().kernels == "gpu"
    seen = []
    jax.pmap(lambda x: (seen.append(platform().kernels), x)[1])(jnp.zeros(2))
    assert set(seen) == {"gpu"}
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for axes, expected in (({"a"}, "none"), ({"a", "b"}, "gpu")):
        seen.clear()
        jax.jit(
            jax.shard_map(
                lambda x: (seen.append(platform().kernels), x)[1],
                mesh=mesh,
                in_specs=PartitionSpec("a"),
                out_specs=PartitionSpec("a"),
                axis_names=axes,
            )
        )(jnp.zeros(2))
        assert set(seen) == {expected}
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        assert platform().kernels == "none"
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    monkeypatch.setenv("CLARS_OPTAX_KERNEL", "off")
    assert platform().kernels == "none"
