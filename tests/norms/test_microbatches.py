"""Micro-batches give the results of the whole batch where nothing couples the examples."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clars_optax
from tests.norms.models import normal

PARAMS = {"w": normal(0, 4, 3), "b": normal(1, 3)}
X, Y = normal(2, 12, 4), normal(3, 12, 3)


def loss_fn(params, x, y):
    outputs = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((outputs - y) ** 2), {"outputs": outputs, "mean": outputs.mean()}


def step_of(loss=loss_fn, **options):
    return clars_optax.value_and_grad_and_norms(loss, has_aux=True, batch_argnums=(1, 2), **options)


@pytest.fixture(params=["unrolled", "scanned"])
def way(request, monkeypatch):
    """Elsewhere than on a CPU the micro-batches are a loop."""
    if request.param == "scanned":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setenv("CLARS_OPTAX_KERNEL", "off")  # There is none, after all.
    return request.param


@pytest.mark.parametrize(
    "options",
    [
        {"microbatch_size": 4},
        {"microbatch_size": 12},
        {"microbatch_size": 1},
        {"microbatch_size": 4, "group_size": 2},
        {"microbatch_size": 4, "num_norm_examples": 10},
        {"microbatch_size": 6, "num_norm_examples": 4, "group_size": 2},
        {"microbatch_size": 3, "num_norm_examples": 6},
        {"microbatch_size": 3, "num_norm_examples": 0},
    ],
    ids=str,
)
def test_same_as_the_whole_batch(options, way):
    whole = {name: size for name, size in options.items() if name != "microbatch_size"}
    expected = jax.jit(step_of(**whole))(PARAMS, X, Y)
    found = jax.jit(step_of(**options))(PARAMS, X, Y)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    if way == "scanned" and options["microbatch_size"] < 6:
        assert "scan" in str(jax.make_jaxpr(step_of(**options))(PARAMS, X, Y))


@pytest.mark.parametrize("microbatch_size", [1, 2])
def test_fewer_than_devices_of_a_mesh_with_two_axes(microbatch_size, way):
    """XLA's partitioner takes such a cut for another one if it knows the place."""

    def loss(table, places, y):
        return jnp.mean(jnp.sum((table[places].sum(1) - y) ** 2, axis=1))

    places, y = jnp.arange(40).reshape(8, 5) * 7 % 10, normal(3, 8, 4)
    step = jax.jit(
        clars_optax.value_and_grad_and_norms(
            loss, batch_argnums=(1, 2), microbatch_size=microbatch_size
        )
    )
    expected = step(normal(0, 10, 4), places, y)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    table = jax.device_put(normal(0, 10, 4), jax.NamedSharding(mesh, jax.P()))
    batch = jax.device_put((places, y), jax.NamedSharding(mesh, jax.P("data")))
    chex.assert_trees_all_close(step(table, *batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_no_norms_leave_the_plain_gradient(microbatch_size, way):
    step = jax.jit(step_of(num_norm_examples=0, microbatch_size=microbatch_size))

    value, grads, norms = step(PARAMS, X, Y)

    expected = jax.value_and_grad(loss_fn, has_aux=True)(PARAMS, X, Y)
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.map(jnp.shape, norms) == {"w": (0,), "b": (0,)}


def test_program_of_a_loop_does_not_grow_with_the_microbatches(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("CLARS_OPTAX_KERNEL", "off")
    step = step_of(microbatch_size=2)

    few, many = (
        len(jax.make_jaxpr(step)(PARAMS, normal(2, n, 4), normal(3, n, 3)).eqns) for n in (12, 96)
    )

    assert many == few


def test_sum(way):
    def summed(*args):
        value, aux = loss_fn(*args)
        return value * args[1].shape[0], aux

    expected = jax.jit(step_of(summed, loss_reduction="sum"))(PARAMS, X, Y)
    found = jax.jit(step_of(summed, loss_reduction="sum", microbatch_size=3))(PARAMS, X, Y)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_every_micro_batch_has_its_own_key(way):
    def dropout_loss(params, x, y, rngs):
        return loss_fn(params, x * jax.random.bernoulli(rngs["dropout"], 0.5, x.shape), y)

    key = jax.random.key(7)
    found = jax.jit(step_of(dropout_loss, microbatch_size=4, rng_argnums=3))(
        PARAMS, X, Y, {"dropout": key}
    )
    expected = [
        dropout_loss(
            PARAMS, X[i : i + 4], Y[i : i + 4], {"dropout": jax.random.fold_in(key, i // 4)}
        )
        for i in (0, 4, 8)
    ]
    outputs = jnp.concatenate([aux["outputs"] for _, aux in expected])
    np.testing.assert_allclose(found[0][1]["outputs"], outputs, rtol=1e-5)
    np.testing.assert_allclose(found[0][0], np.mean([v for v, _ in expected]), rtol=1e-5)


def test_low_precision_is_added_up_in_float32(way):
    """In bfloat16, a sum of 256 equal addends would stop growing half-way."""
    params = {"w": jnp.ones((1,), jnp.bfloat16)}
    x = jnp.full((512, 1), 1.0, jnp.bfloat16)

    def loss(params, x, y):
        return jnp.sum(x @ params["w"]), ()

    if way == "unrolled":
        x = x[:260]
    _, grads, _ = jax.jit(
        step_of(loss, loss_reduction="sum", microbatch_size=1 if way == "scanned" else 10)
    )(params, x, x)
    assert grads["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(grads["w"], x.shape[0], rtol=0.005)


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        (lambda x: {"correct": jnp.sum(x > 0)}, r"aux\['correct'\] \(int32\[\]\)"),
        (lambda x: {"pairs": x @ x.T}, r"aux\['pairs'\] \(float32\[4, 4\]\).*one axis that is"),
        (lambda x: {"merged": x.reshape(-1)}, r"aux\['merged'\] \(float32\[16\]\)"),
    ],
    ids=["count", "pairs", "merged"],
)
def test_auxiliary_outputs_that_cannot_be_put_together(aux, message):
    step = step_of(lambda p, x, y: (loss_fn(p, x, y)[0], aux(x)), microbatch_size=4)
    with pytest.raises(ValueError, match=message):
        step(PARAMS, X, Y)


def test_batch_statistics_are_those_of_the_micro_batch():
    def centred(params, x, y):
        outputs = x @ params["w"] + params["b"]
        mean = outputs.mean(0)
        return loss_fn(params, (outputs - mean) @ params["w"].T, y)[0], mean

    (value, mean), _, norms = jax.jit(step_of(centred, microbatch_size=6))(PARAMS, X, Y)
    halves = [jax.jit(step_of(centred))(PARAMS, X[i : i + 6], Y[i : i + 6]) for i in (0, 6)]
    np.testing.assert_allclose(value, np.mean([half[0][0] for half in halves]), rtol=1e-6)
    np.testing.assert_allclose(mean, np.mean([half[0][1] for half in halves], axis=0), rtol=1e-5)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), halves[0][2], halves[1][2])
    chex.assert_trees_all_close(norms, joined, rtol=1e-5)


def test_multi_steps_loses_norms_that_microbatches_keep():
    """`optax.MultiSteps` averages gradients, but the emitted step sees the last norms only."""
    x = X * jnp.where(jnp.arange(12) < 6, 10.0, 0.1)[:, None]  # two very different halves
    tx = clars_optax.clars(1.0, momentum=0.0, trust_coefficient=0.5, max_trust_ratio=100.0)
    state = tx.init(PARAMS)
    _, grads, norms = step_of()(PARAMS, x, Y)
    whole, _ = tx.update(grads, state, PARAMS, example_grad_norms=norms)
    _, grads, norms = step_of(microbatch_size=6)(PARAMS, x, Y)
    accumulated, _ = tx.update(grads, state, PARAMS, example_grad_norms=norms)
    chex.assert_trees_all_close(accumulated, whole, rtol=1e-5)

    multi = optax.MultiSteps(tx, every_k_schedule=2)
    multi_state = multi.init(PARAMS)
    for half in (slice(0, 6), slice(6, 12)):
        _, grads, norms = step_of()(PARAMS, x[half], Y[half])
        emitted, multi_state = multi.update(grads, multi_state, PARAMS, example_grad_norms=norms)
    last_only, _ = tx.update(step_of()(PARAMS, x, Y)[1], state, PARAMS, example_grad_norms=norms)
    chex.assert_trees_all_close(emitted, last_only, rtol=1e-5)
    assert jnp.linalg.norm(emitted["w"]) > 2 * jnp.linalg.norm(whole["w"])
