"""Under `jit`, `vmap`, `pmap`, `shard_map`, `scan`, and with models of Flax Linen and NNX."""

import contextlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clars_optax
from tests.norms.models import normal

PARAMS = {"w": normal(0, 4, 3), "scale": 1 + 0.3 * normal(1, 3)}
X, Y = normal(2, 8, 4), normal(3, 8, 3)


def batch_norm_loss(axis_name):
    """With statistics of all devices, if they have a name."""

    def mean(h):
        h = h.mean(0)
        return h if axis_name is None else jax.lax.pmean(h, axis_name)

    def loss(params, x, y):
        h = x @ params["w"]
        centred = h - mean(h)
        h = centred * jax.lax.rsqrt(mean(centred**2) + 1e-3) * params["scale"]
        return jnp.mean(jnp.sum((jnp.tanh(h) - y) ** 2, axis=1))

    return loss


def step_of(loss, **options):
    return clars_optax.value_and_grad_and_norms(loss, batch_argnums=(1, 2), **options)


@pytest.fixture(scope="module")
def one_device():
    return jax.jit(step_of(batch_norm_loss(None)))(PARAMS, X, Y)


def test_eager(one_device):
    chex.assert_trees_all_close(step_of(batch_norm_loss(None))(PARAMS, X, Y), one_device, rtol=1e-5)


def test_compiled_once():
    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, x, y):
        return step_of(batch_norm_loss(None))(params, x, y)

    _, grads, _ = step(PARAMS, X, Y)
    step(jax.tree.map(jnp.subtract, PARAMS, grads), X + 1, Y)


def test_pmap_with_statistics_of_all_devices(one_device):
    def step(params, x, y):
        value, grads, norms = step_of(batch_norm_loss("devices"))(params, x, y)
        mean_norms = jax.lax.pmean(jax.tree.map(jnp.mean, norms), "devices")
        return *jax.lax.pmean((value, grads), "devices"), norms, mean_norms

    mapped = jax.pmap(step, "devices", in_axes=(None, 0, 0), devices=jax.devices()[:4])
    value, grads, norms, mean_norms = mapped(PARAMS, X.reshape(4, 2, 4), Y.reshape(4, 2, 3))
    first = jax.tree.map(lambda x: x[0], (value, grads, mean_norms))
    expected = (*one_device[:2], jax.tree.map(jnp.mean, one_device[2]))
    chex.assert_trees_all_close(first, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.tree.map(jnp.ravel, norms), one_device[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(4,), (4, 2)], ids=["all axes", "one of two axes"])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_shard_map_with_varying_parameters(one_device, microbatch_size, sizes):
    def step(params, x, y):
        params = jax.lax.pcast(params, "devices", to="varying")
        value, grads, norms = step_of(batch_norm_loss("devices"), microbatch_size=microbatch_size)(
            params, x, y
        )
        return *jax.lax.pmean((value, grads), "devices"), norms

    names = ("devices", "model")[: len(sizes)]
    mesh = jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    split, same = jax.P("devices"), jax.P()
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(same, split, split),
        out_specs=(same, same, split),
        axis_names={"devices"},
    )
    chex.assert_trees_all_close(jax.jit(mapped)(PARAMS, X, Y), one_device, rtol=1e-5, atol=1e-6)


def uncoupled_loss(params, x, y):
    h = jnp.tanh(x @ params["w"] * params["scale"])
    return jnp.mean(jnp.sum((h - y) ** 2, axis=1)), h


def sum_of_everything(value, grads, norms):
    value, aux = value
    cubes = [jnp.sum(leaf**3) for leaf in jax.tree.leaves((grads, norms))]
    return value + jnp.sum(aux**2) + sum(cubes)


def by_definition(params, x, y):
    def of_example(params, x, y):
        return uncoupled_loss(params, x[None], y[None])[0]

    result = jax.value_and_grad(uncoupled_loss, has_aux=True)(params, x, y)
    grads = jax.vmap(jax.grad(of_example), (None, 0, 0))(params, x, y)
    norms = jax.tree.map(lambda g: jnp.linalg.norm(g.reshape(len(g), -1), axis=1), grads)
    return sum_of_everything(*result, norms)


def test_derivatives_of_everything_it_returns():
    def ours(params, x, y):
        return sum_of_everything(*step_of(uncoupled_loss, has_aux=True)(params, x, y))

    found, expected = (jax.jit(jax.grad(f, (0, 1)))(PARAMS, X, Y) for f in (ours, by_definition))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_derivatives_that_would_be_wrong_are_refused():
    def ours(params, x, y):
        step = step_of(uncoupled_loss, has_aux=True, method="generic")
        return sum_of_everything(*step(params, x, y))

    with pytest.raises(NotImplementedError, match=r"to the parameter args\[0\]\['w'\]"):
        jax.jit(jax.grad(lambda w: ours(PARAMS | {"w": w}, X, Y)))(PARAMS["w"])
    # Others are right.
    found, expected = (jax.jit(jax.grad(f, 1))(PARAMS, X, Y) for f in (ours, by_definition))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_vmap_over_seeds_and_scan_over_steps():
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)
    step = step_of(batch_norm_loss(None))
    found = jax.jit(jax.vmap(step, in_axes=(0, None, None)))(params, X, Y)
    _, scanned = jax.lax.scan(lambda _, p: (None, step(p, X, Y)), None, params)
    for i in range(3):
        expected = jax.jit(step)(jax.tree.map(lambda p, i=i: p[i], params), X, Y)
        for result in (found, scanned):
            one = jax.tree.map(lambda x, i=i: x[i], result)
            chex.assert_trees_all_close(one, expected, rtol=1e-5, atol=1e-6)


def test_batch_sharded_under_jit(one_device):
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    x, y = jax.device_put((X, Y), jax.NamedSharding(mesh, jax.P("devices")))
    found = jax.jit(step_of(batch_norm_loss(None)))(PARAMS, x, y)
    chex.assert_trees_all_close(found, one_device, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharded_params", [False, True])
@pytest.mark.parametrize("in_context", [False, True])
@pytest.mark.parametrize("options", [{}, {"group_size": 2, "num_norm_examples": 4}], ids=str)
def test_batch_sharded_over_an_explicit_mesh(options, in_context, sharded_params):
    """Not in the test of an automatic mesh: here, the types of arrays say how they are sharded."""
    mesh = jax.make_mesh((4,), ("devices",))

    def loss(params, x, y):
        h = jnp.tanh(x @ params["w"])
        return batch_norm_loss(None)(params, x, y), (h, h.mean())

    expected = jax.jit(step_of(loss, has_aux=True, **options))(PARAMS, X, Y)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        x, y = jax.device_put((X, Y), jax.NamedSharding(mesh, jax.P("devices")))
        split = jax.P("devices" if sharded_params else None)
        params = {
            "w": jax.device_put(PARAMS["w"], jax.NamedSharding(mesh, split)),
            "scale": jax.device_put(PARAMS["scale"], jax.NamedSharding(mesh, jax.P())),
        }
        found = jax.jit(step_of(loss, has_aux=True, **options))(params, x, y)
        eager = step_of(loss, has_aux=True, **options)(params, x, y)
    (_, (h, _)), grads, norms = found
    assert jax.typeof(h).sharding.spec == jax.P("devices", None)
    assert jax.typeof(grads["w"]).sharding.spec == jax.P(*split, None)
    assert jax.typeof(norms["w"]).sharding.spec == jax.P(None)
    for result in (found, eager):
        chex.assert_trees_all_close(
            jax.tree.map(np.asarray, result), expected, rtol=1e-5, atol=1e-6
        )


def test_parameters_of_numpy_beside_a_batch_on_an_explicit_mesh():
    params = {**jax.tree.map(np.asarray, PARAMS), "shift": 0.5}

    def loss(params, x, y):
        return batch_norm_loss(None)(params, x, y) + jnp.mean(x * params["shift"])

    expected = step_of(loss)(params, X, Y)
    mesh = jax.make_mesh((8,), ("devices",))
    x, y = jax.device_put((X, Y), jax.NamedSharding(mesh, jax.P("devices")))
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with context:
            found = jax.tree.map(np.asarray, step_of(loss)(params, x, y))
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_parameters_on_an_explicit_axis_inside_shard_map_over_another():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    w = jax.device_put(PARAMS["w"], jax.NamedSharding(mesh, jax.P("model")))
    x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("data")))

    def loss(w, x):
        return jnp.mean(jnp.sum(jnp.tanh(x @ w) ** 2, axis=1))

    def on_each(w, x):
        w = jax.lax.pcast(w, "data", to="varying")
        value, grads, norms = clars_optax.value_and_grad_and_norms(loss)(w, x)
        return jax.lax.pmean((value, grads), "data"), norms

    out_specs = (jax.P(), jax.P("data"))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            on_each,
            mesh=mesh,
            in_specs=(jax.P(), jax.P("data")),
            out_specs=out_specs,
            axis_names={"data"},
        )
        found = jax.tree.map(np.asarray, jax.jit(mapped)(w, x))
    value, grads, norms = clars_optax.value_and_grad_and_norms(loss)(PARAMS["w"], X)
    chex.assert_trees_all_close(found, ((value, grads), norms), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scaled_losses(one_device, scale):
    def scaled(*args):
        return scale * batch_norm_loss(None)(*args)

    _, _, norms = jax.jit(step_of(scaled))(PARAMS, X, Y)
    expected = jax.tree.map(lambda n: scale * n, one_device[2])
    chex.assert_trees_all_close(norms, expected, rtol=1e-5)


def test_low_precision():
    def loss(params, x, y):
        h = jnp.tanh(x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16))
        return jnp.mean(jnp.sum((h.astype(jnp.float32) * params["scale"] - y) ** 2, axis=1))

    params = {**PARAMS, "scale": PARAMS["scale"].astype(jnp.bfloat16)}
    _, grads, norms = jax.jit(step_of(loss))(params, X, Y)
    assert (grads["w"].dtype, grads["scale"].dtype) == (jnp.float32, jnp.bfloat16)
    assert {n.dtype for n in jax.tree.leaves(norms)} == {jnp.dtype("float32")}
    per_example = jax.vmap(lambda x, y: jax.grad(loss)(params, x[None], y[None]))(X, Y)
    for name, norm in norms.items():
        expected = np.linalg.norm(np.asarray(per_example[name], np.float64).reshape(8, -1), axis=1)
        np.testing.assert_allclose(norm, expected, rtol=1e-2)


def test_dropout_mask_is_drawn_once():
    """The second trace, at twice the batch size, leaves no mark on the first."""

    def loss(params, x, y, key):
        h = x @ params["w"] * jax.random.bernoulli(key, 0.5, (x.shape[0], 3)) * params["scale"]
        return jnp.mean(jnp.sum((h - y) ** 2, axis=1))

    key = jax.random.key(3)
    value, grads, norms = jax.jit(step_of(loss))(PARAMS, X, Y, key)
    chex.assert_trees_all_close(
        (value, grads), jax.value_and_grad(loss)(PARAMS, X, Y, key), rtol=1e-5
    )
    kept = jax.random.bernoulli(key, 0.5, (8, 3))
    residuals = 2 * (X @ PARAMS["w"] * kept * PARAMS["scale"] - Y)
    np.testing.assert_allclose(
        norms["scale"], jnp.linalg.norm(residuals * (X @ PARAMS["w"]) * kept, axis=1), rtol=1e-4
    )


def test_trains_a_linen_model_with_train_state():
    model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(3)])
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    tx = clars_optax.clars(0.5, trust_coefficient=0.1, max_trust_ratio=1.0)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state):
        def loss_fn(params, x, y):
            return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

        value, grads, norms = step_of(loss_fn)(params, X, Y)
        updates, state = tx.update(grads, state, params, example_grad_norms=norms)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(60):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]


def test_trains_an_nnx_model_with_batch_norm():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.out = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.hidden(x))))

    model = Net(nnx.Rngs(0))
    tx = clars_optax.clars(0.5, trust_coefficient=0.1, max_trust_ratio=1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(params, rest, graph, x, y):
        model = nnx.merge(graph, params, rest)
        loss = jnp.mean((model(x) - y) ** 2)
        return loss, nnx.state(model, nnx.BatchStat)

    @nnx.jit
    def train_step(model, optimizer, x, y):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        step = clars_optax.value_and_grad_and_norms(loss_fn, has_aux=True, batch_argnums=(3, 4))
        (loss, stats), grads, norms = step(params, rest, graph, x, y)
        nnx.update(model, stats)
        optimizer.update(model, grads, example_grad_norms=norms)
        return loss

    before = model.norm.mean[...]
    losses = [float(train_step(model, optimizer, X, Y)) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    assert not jnp.allclose(model.norm.mean[...], before)


def test_padded_losses():
    """An unnormalised loss, divided by the weights at the end, is that of the real examples."""
    real = jnp.arange(8) < 5

    def summed(params, x, y, weights):
        losses = jnp.sum((jnp.tanh(x @ params["w"]) * params["scale"] - y) ** 2, axis=1)
        return jnp.sum(weights * losses)

    def of_real(params, x, y):
        return summed(params, x, y, jnp.ones(x.shape[0])) / x.shape[0]

    step = clars_optax.value_and_grad_and_norms(
        summed, batch_argnums=(1, 2, 3), loss_reduction="sum", microbatch_size=4
    )
    value, grads, norms = jax.jit(step)(PARAMS, X, Y, real.astype(jnp.float32))
    sums = (value, grads, jax.tree.map(jnp.sum, norms))
    found = jax.tree.map(lambda total: total / real.sum(), sums)
    value, grads, norms = jax.jit(step_of(of_real))(PARAMS, X[:5], Y[:5])
    expected = (value, grads, jax.tree.map(jnp.mean, norms))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
