"""The kernels' work in shares: on several devices under `jit`, and for arrays of any size."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import clars_optax
from clars_optax.norms._rules import _depthwise, _kernel, _shardings, _shares
from clars_optax.norms._rules._geometry import Geometry, Window
from tests.norms.interpreted import assert_same, network

OPTIONS = {"sides": _kernel.Sides(16, 16, 16), "scale": 0.5, "precision": None, "interpret": True}


@pytest.fixture
def run_for():
    """The geometries that the kernel was run for."""
    return []


@pytest.fixture
def kernel(run_for):
    """The kernel for products, in the interpreter."""

    def run(geometry, x, g, **options):
        run_for.append(geometry)
        return _kernel.weight_gradient_and_squares(geometry, x, g, **options)

    largest = Geometry.image_entries.fget
    return _shares.Kernel(functools.partial(run, **OPTIONS), ("btdp", "n"), largest)


def auto_mesh(**sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def placed(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def draw(*shapes, dtype=jnp.float32):
    """Small integers, whose sums are exact in any order."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.integers(-3, 4, shape), dtype) for shape in shapes]


def dense(groups=8, inner=8, outer=12):
    return Geometry(groups, 1, 5, (), inner, outer, blocks_first=True)


def by_definition(x, g):
    rows = np.einsum("gbud,gbup->gbdp", x, g)
    return rows.sum(0)[:, None], np.sum((0.5 * rows) ** 2, axis=(1, 2, 3))


@pytest.mark.parametrize(
    ("of_x", "of_g", "share"),
    [
        (["data"], ["data"], (2, 8, 12)),
        ([("data", "model")], [("data", "model")], (1, 8, 12)),
        ([("model", "data")], [("model", "data")], (1, 8, 12)),
        (["data", None, None, "model"], ["data"], (2, 4, 12)),
        (["data"], ["data", None, None, "model"], (2, 8, 6)),
        ([None, None, None, "data"], [None, None, None, "model"], (8, 2, 6)),
        # Positions are gathered, and an axis serves one purpose.
        ([None, None, None, "model"], ["data"], (2, 4, 12)),
        (["model"], ["model", None, None, "data"], (4, 8, 3)),
        ([], [], (8, 8, 12)),
    ],
    ids=str,
)
def test_each_device_has_its_groups_and_channels(kernel, run_for, of_x, of_g, share):
    mesh = auto_mesh(data=4, model=2)
    x, g = draw((8, 1, 5, 8), (8, 1, 5, 12))
    run = jax.jit(functools.partial(_shares.shared_out, kernel, dense()))
    total, squares = run(placed(mesh, x, *of_x), placed(mesh, g, *of_g))
    np.testing.assert_array_equal(total, by_definition(x, g)[0])
    np.testing.assert_array_equal(squares, by_definition(x, g)[1])
    local = run_for[-1]
    assert (local.groups, local.inner, local.outer) == share
    # The results lie as the operands do.
    assert total.sharding.shard_shape(total.shape) == (1, 1, *share[1:])
    assert squares.sharding.shard_shape(squares.shape) == (share[0],)


@pytest.mark.parametrize(
    ("sizes", "groups", "share"),
    [
        ({"data": 8}, 4, 1),  # a group lies on two devices
        ({"data": 8}, 12, 3),
        ({"data": 6}, 3, 3),  # all on each: of 2 * 3 devices, no axis has every second one
        ({"one": 2, "other": 4}, 4, 1),
    ],
)
def test_groups_on_several_devices(kernel, run_for, sizes, groups, share):
    mesh = auto_mesh(**sizes)
    x, g = draw((24, 1, 5, 8), (24, 1, 5, 12))

    def in_groups(z):
        return jnp.moveaxis(z.reshape(groups, -1, *z.shape[1:]), 1, 2).reshape(
            groups, 1, -1, z.shape[-1]
        )

    geometry = Geometry(groups, 1, 5 * 24 // groups, (), 8, 12, blocks_first=True)
    run = jax.jit(lambda *xg: _shares.shared_out(kernel, geometry, *map(in_groups, xg)))
    found = run(*(placed(mesh, z, tuple(sizes)) for z in (x, g)))
    for result, expected in zip(found, by_definition(in_groups(x), in_groups(g)), strict=True):
        np.testing.assert_array_equal(result, expected)
    assert run_for[-1].groups == share


@pytest.mark.parametrize(
    ("geometry", "dtype", "share"),
    [
        # Two channels of 16 bits are a word.
        (dense(inner=12, outer=8), jnp.bfloat16, (8, 12, 4)),
        (dense(inner=12, outer=8), jnp.float32, (8, 3, 4)),
        # Channels of several blocks, and the rows of a folded image, are not cut.
        (Geometry(8, 2, 5, (), 8, 4, blocks_first=False), jnp.float32, (8, 8, 4)),
        (Geometry(8, 1, 1, (Window(5, 5, 1),), 8, 4, False, folded=True), jnp.float32, (8, 8, 4)),
    ],
)
def test_channels_that_are_not_cut(kernel, run_for, geometry, dtype, share):
    mesh = auto_mesh(a=4, b=2)
    lead = (8, 1, 5) if geometry.blocks_first else (8, 5)
    widths = geometry.blocks * geometry.inner, geometry.blocks * geometry.outer
    x, g = draw(*((*lead, width) for width in widths), dtype=dtype)
    free = [None] * len(lead)
    found = jax.jit(functools.partial(_shares.shared_out, kernel, geometry))(
        placed(mesh, x, *free, "a"), placed(mesh, g, *free, "b")
    )
    expected = _kernel.weight_gradient_and_squares(geometry, x, g, **OPTIONS)
    for result, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)
    local = run_for[-1]
    assert (local.groups, local.inner, local.outer) == share


def test_sharded_images_of_convolutions(kernel, run_for):
    mesh = auto_mesh(data=4, model=2)
    window = Window(8, 4, 3, stride=2, padding=1)
    geometry = Geometry(8, 1, 1, (window,), 4, 6, blocks_first=False)
    x, g = draw((8, 8, 4), (8, 4, 6))
    found = jax.jit(functools.partial(_shares.shared_out, kernel, geometry))(
        placed(mesh, x, "data", "model"), placed(mesh, g, "data", "model")
    )
    expected = _kernel.weight_gradient_and_squares(geometry, x, g, **OPTIONS)
    for result, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)
    assert run_for[-1].groups == 2


def test_depthwise_kernels_on_devices():
    mesh = auto_mesh(data=8)
    geometry = Geometry(8, 3, 1, (Window(6, 6, 3, padding=1),), 1, 1, blocks_first=False)
    kernel = _shares.Kernel(
        functools.partial(_depthwise.gradients_of_groups, interpret=True),
        ("ntc",),
        Geometry.image_entries.fget,
    )
    x, g = draw((8, 6, 3), (8, 6, 3))
    on_devices = jax.jit(functools.partial(_shares.shared_out, kernel, geometry))
    (rows,) = on_devices(placed(mesh, x, "data"), placed(mesh, g, "data"))
    (expected,) = _depthwise.gradients_of_groups(geometry, x, g, interpret=True)
    np.testing.assert_array_equal(rows, expected)
    assert rows.sharding.shard_shape(rows.shape) == (1, 3, 3)


@pytest.mark.parametrize("largest", [40, 80, 200, 10**6])
def test_large_arrays_in_runs(kernel, run_for, monkeypatch, largest):
    monkeypatch.setattr(_shares, "_LARGEST", largest)
    x, g = draw((7, 1, 5, 8), (7, 1, 5, 12))
    found = kernel(dense(groups=7), x, g)
    for result, expected in zip(found, by_definition(x, g), strict=True):
        np.testing.assert_array_equal(result, expected)
    assert sum(geometry.groups for geometry in run_for) == 7
    assert all(geometry.image_entries <= largest for geometry in run_for)
    assert kernel.takes(dense(groups=10**9))
    assert not kernel.takes(dense(inner=largest))


def test_other_options_make_another_program_for_the_cache(kernel):
    """The kernel comes in only when the program is compiled."""
    x, g = draw((8, 1, 5, 8), (8, 1, 5, 12))
    mesh = auto_mesh(data=8)

    def program(geometry, **options):
        run = functools.partial(kernel.run.func, **(OPTIONS | options))
        other = _shares.Kernel(run, kernel.results, kernel.largest)
        lowered = jax.jit(functools.partial(_shares.shared_out, other, geometry)).lower(
            placed(mesh, x, "data"), placed(mesh, g, "data")
        )
        # JAX can be told to leave out the address as well.
        return re.sub(r'backend_config = "\d+"', "", lowered.as_text())

    image = Geometry(8, 1, 1, (Window(1, 1, 1), Window(5, 5, 1)), 8, 12, False)
    programs = [program(dense()), program(image), program(dense(), scale=0.25)]
    assert len(set(programs)) == 3
    assert program(dense()) == programs[0]


def test_names_of_parts_of_axes():
    devices = jax.devices()[:6]
    mesh, other = (
        Mesh(np.array(devices).reshape(shape), tuple("ab"[: len(shape)]))
        for shape in ((6,), (3, 2))
    )

    def sharded(mesh, name):
        sharding = NamedSharding(mesh, PartitionSpec(name))
        return jax.ShapeDtypeStruct((6, 4), jnp.float32, sharding=sharding)

    for given in (mesh, jax.sharding.AbstractMesh((), ())):
        fine, (found,) = _shardings.named(given, [sharded(mesh, "a")])
        assert fine.devices.shape == (2, 3)
        assert list(fine.devices.flat) == devices
        assert found == [fine.axis_names, ()]
        # Every second device has the same rows. Two times three cannot say that.
        assert _shardings.named(given, [sharded(other, "b")])[1] == [[(), ()]]
    fine, (found,) = _shardings.named(other, [sharded(other, "b")])
    assert found == [fine.axis_names[1:], ()]


@pytest.mark.parametrize("is_explicit", [False, True])
def test_network_with_a_sharded_batch(interpreted, problem, is_explicit):
    params, x = problem
    expected = jax.jit(clars_optax.value_and_grad_and_norms(network, method="generic"))(params, x)
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=((AxisType.Explicit if is_explicit else AxisType.Auto),)
    )
    step = jax.jit(clars_optax.value_and_grad_and_norms(network))
    params = jax.tree.map(functools.partial(placed, mesh), params)
    compiled = step.lower(params, placed(mesh, x, "data")).compile()
    assert_same(compiled(params, placed(mesh, x, "data")), expected, atol=1e-4)


def test_mapped_by_vmap_others_take_the_place_of_kernels(interpreted):
    def loss_fn(w, x):
        return jnp.mean(jnp.sum(jnp.tanh(x @ w), axis=(1, 2)))

    step = clars_optax.value_and_grad_and_norms(loss_fn)
    w, x = jnp.ones((2, 5, 6)), jnp.ones((4, 3, 5))
    assert "pallas_call[" in str(jax.make_jaxpr(step)(w[0], x))
    assert "pallas_call[" not in str(jax.make_jaxpr(jax.vmap(step, (0, None)))(w, x))
