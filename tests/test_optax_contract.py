"""`clars` inside the wrappers of Optax, the transformations of JAX and the trainers of Flax."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import clars_optax

pytestmark = pytest.mark.usefixtures("compiled_fast")

MASKS = ("weight_decay_mask", "trust_ratio_mask")
CLARS = clars_optax.clars(0.5, weight_decay=0.1)


def problem(dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "body": {"kernel": jax.random.normal(keys[0], (3, 4)), "bias": jnp.ones(4)},
        "head": {"kernel": jax.random.normal(keys[1], (4, 2)).astype(dtype)},
    }
    grads = jax.tree.map(lambda p: jnp.cos(p * 3), params)
    norms = jax.tree.map(lambda p: jax.random.uniform(keys[2], (5,)) + 0.5, params)
    return params, grads, norms


def assert_trees_close(one, other, rtol=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-8), one, other)


def first_update(tx, params, grads, norms, **extra_args):
    state = tx.init(params)
    return tx.update(grads, state, params, example_grad_norms=norms, **extra_args)[0]


def two_steps(tx, params, grads, norms):
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, example_grad_norms=norms)
        params = optax.apply_updates(params, updates)
    return params


def test_chain_and_unknown_extra_args():
    params, grads, norms = problem()
    expected = first_update(CLARS, params, grads, norms)
    tx = optax.chain(optax.scale(2.0), CLARS, optax.clip_by_global_norm(1e9))
    halves = jax.tree.map(lambda g: g / 2, grads)
    assert_trees_close(first_update(tx, params, halves, norms, value=1.0, typo=None), expected)


@pytest.mark.parametrize("compatible", [False, True])
def test_masked(compatible):
    params, grads, norms = problem()
    expected = first_update(CLARS, params, grads, norms)
    tx = optax.masked(CLARS, {"body": True, "head": False}, mask_compatible_extra_args=compatible)
    updates = first_update(tx, params, grads, norms)
    assert_trees_close(updates, {"body": expected["body"], "head": grads["head"]})


@pytest.mark.parametrize("compatible", [False, True])
def test_partition(compatible):
    params, grads, norms = problem()
    expected = first_update(CLARS, params, grads, norms)
    labels = {"body": "clars", "head": {"kernel": "sgd"}}
    tx = optax.partition(
        {"clars": CLARS, "sgd": optax.sgd(1.0)}, labels, mask_compatible_extra_args=compatible
    )
    updates = first_update(tx, params, grads, norms)
    head = jax.tree.map(jnp.negative, grads["head"])
    assert_trees_close(updates, {"body": expected["body"], "head": head})


def test_inject_hyperparams():
    params, grads, norms = problem()
    inject = optax.inject_hyperparams(clars_optax.clars, static_args=MASKS)
    tx = inject(learning_rate=lambda step: 0.5 / (1 + step), weight_decay=0.1)
    plain = clars_optax.clars(lambda step: 0.5 / (1 + step), weight_decay=0.1)
    expected = two_steps(plain, params, grads, norms)
    assert_trees_close(two_steps(tx, params, grads, norms), expected, rtol=1e-5)

    state = tx.init(params)
    assert state.hyperparams.keys() == {
        "learning_rate", "momentum", "weight_decay", "trust_coefficient", "max_trust_ratio", "eps",
    }  # fmt: skip
    state.hyperparams["max_trust_ratio"] = jnp.float32(0.001)
    updates, _ = jax.jit(tx.update)(grads, state, params, example_grad_norms=norms)
    capped = clars_optax.clars(0.5, weight_decay=0.1, max_trust_ratio=0.001)
    assert_trees_close(updates, first_update(capped, params, grads, norms), rtol=1e-5)


@pytest.mark.parametrize("static_args", [(), MASKS[:1], MASKS[1:]])
def test_inject_hyperparams_without_static_args(static_args):
    tx = optax.inject_hyperparams(clars_optax.clars, static_args=static_args)(learning_rate=0.1)
    with pytest.raises(ValueError, match=r"step count.*static_args=\(\"weight_decay_mask\""):
        tx.init(problem()[0])


@pytest.mark.parametrize(
    "tx",
    [
        CLARS,
        clars_optax.clars(optax.linear_schedule(0.5, 0.0, 9), nesterov=True, weight_decay=0.1),
        optax.inject_hyperparams(clars_optax.clars, static_args=MASKS)(0.5, weight_decay=0.1),
        optax.apply_if_finite(CLARS, 3),
        optax.MultiSteps(CLARS, 1),
    ],
    ids=["plain", "schedule", "inject_hyperparams", "apply_if_finite", "multi_steps"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept_and_the_second_step_compiles_nothing(tx, dtype):
    params, grads, norms = problem(dtype)
    traces = 0

    @jax.jit
    def step(params, state):
        nonlocal traces
        traces += 1
        updates, state = tx.update(grads, state, params, example_grad_norms=norms)
        return optax.apply_updates(params, updates), updates, state

    def dtypes(tree):
        return jax.tree.map(lambda x: (jnp.result_type(x), jnp.shape(x)), tree)

    first = tx.init(params)
    new, updates, state = step(params, first)
    assert dtypes(new) == dtypes(updates) == dtypes(params)
    assert dtypes(state) == dtypes(first)
    step(*step(new, state)[::2])
    assert traces == 1


def test_scan():
    params, grads, norms = problem(jnp.bfloat16)
    tx = optax.inject_hyperparams(clars_optax.clars, static_args=MASKS)(0.5, weight_decay=0.1)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params, example_grad_norms=norms)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (params, tx.init(params)), length=2)
    assert_trees_close(
        jax.tree.map(jnp.float32, scanned),
        jax.tree.map(jnp.float32, two_steps(tx, params, grads, norms)),
        rtol=1e-2,
    )


def test_vmap_over_seeds():
    runs = [problem(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    updates = jax.vmap(functools.partial(first_update, CLARS))(*stacked)
    for i, run in enumerate(runs):
        one = jax.tree.map(lambda u, i=i: u[i], updates)
        assert_trees_close(one, first_update(CLARS, *run), rtol=1e-5)


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"]) ** 2)


def gradient_and_norms(loss_fn, params, x):
    example_grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, x[:, None])
    norms = jax.tree.map(jax.vmap(lambda g: jnp.sqrt(jnp.sum(g**2))), example_grads)
    return jax.grad(loss_fn)(params, x), norms


def test_pmap_equals_one_device():
    n_devices = jax.local_device_count()
    assert n_devices == 8
    params = problem()[0]
    x = jnp.sin(jnp.arange(16 * 3.0)).reshape(16, 3)
    expected = first_update(CLARS, params, *gradient_and_norms(loss_fn, params, x))

    def step(x):
        grads, norms = gradient_and_norms(loss_fn, params, x)
        means = jax.tree.map(jnp.mean, norms)
        grads, means = jax.lax.pmean((grads, means), "devices")
        return first_update(CLARS, params, grads, means)

    updates = jax.pmap(step, axis_name="devices")(x.reshape(n_devices, -1, 3))
    assert_trees_close(jax.tree.map(lambda u: u[3], updates), expected, rtol=1e-4)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.masked(tx, {"a": True})])
def test_map_params(wrap):
    params = {"a": jnp.ones((2, 2))}
    tx = wrap(clars_optax.clars(optax.constant_schedule(0.1), weight_decay=0.1))
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda _: "param", state, transform_non_params=lambda _: "-")
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert sorted(jax.tree.leaves(mapped)) == ["-", "param"]  # the step count, the buffer


def test_apply_if_finite():
    params, grads, norms = problem()
    tx = optax.apply_if_finite(CLARS, max_consecutive_errors=5)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    updates, state = tx.update(bad, tx.init(params), params, example_grad_norms=norms)
    assert state.notfinite_count == 1
    assert all(not np.any(u) for u in jax.tree.leaves(updates))

    # It looks at the gradients alone: a norm that is not finite shows in the update.
    norms["head"]["kernel"] = norms["head"]["kernel"].at[1].set(jnp.inf)
    updates, _ = tx.update(grads, state, params, example_grad_norms=norms)
    assert np.isnan(updates["head"]["kernel"]).all()
    assert np.isfinite(updates["body"]["kernel"]).all()


class TrainState(train_state.TrainState):
    """Hands the norms on, which the parent class cannot."""

    def apply_gradients(self, *, grads: Any, example_grad_norms: Any, **kwargs: Any):
        updates, opt_state = self.tx.update(
            grads, self.opt_state, self.params, example_grad_norms=example_grad_norms
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)


def test_linen_train_state():
    model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
    x = jnp.sin(jnp.arange(18.0)).reshape(6, 3)
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=clars_optax.clars(0.1))

    def loss_fn(params, x):
        return jnp.mean((state.apply_fn({"params": params}, x) - 1) ** 2)

    @jax.jit
    def step(state, x):
        grads, norms = gradient_and_norms(loss_fn, state.params, x)
        return state.apply_gradients(grads=grads, example_grad_norms=norms)

    new = state
    for _ in range(3):
        new = step(new, x)
    assert loss_fn(new.params, x) < loss_fn(params, x)
    assert new.step == 3

    parent = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=state.tx)
    with pytest.raises(ValueError, match=r"TrainState\.apply_gradients"):
        parent.apply_gradients(grads=params)


def test_nnx_optimizer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(3, 4, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.body(x)))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, clars_optax.clars(0.1, weight_decay=1e-4), wrt=nnx.Param)
    x = jnp.sin(jnp.arange(18.0)).reshape(6, 3)

    @nnx.jit
    def step(model, optimizer, x):
        graph, params = nnx.split(model)

        def loss_fn(params, x):
            return jnp.mean((nnx.merge(graph, params)(x) - 1) ** 2)

        grads, norms = gradient_and_norms(loss_fn, params, x)
        optimizer.update(model, grads, example_grad_norms=norms)
        return loss_fn(params, x)

    losses = [step(model, optimizer, x) for _ in range(4)]
    assert losses[3] < losses[0]
    trace = optimizer.opt_state[1].trace
    assert np.any(trace["body"]["kernel"][...])
