"""`clars` against trajectories computed in NumPy from the formula, and in use."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import clars_optax

SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": (2, 2), "zeros": (2, 3)}


def draw(seed, steps=6, n=5):
    """Parameters, and for each step gradients and norms that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    params["zeros"] *= 0.0
    grads = [{name: rng.normal(size=s) for name, s in SHAPES.items()} for _ in range(steps)]
    norms = [{name: rng.uniform(0.1, 4, size=n) for name in SHAPES} for _ in range(steps)]
    return params, grads, norms


def by_hand(params, grads, norms, *, lr, mu=0.9, nesterov=False, decay=0.0, decays, tc=0.01,
            cap=0.1, eps=1e-6, scaled):  # fmt: skip
    """The formula, in float64, one leaf after another."""
    end = {}
    for name, w in params.items():
        buffer = np.zeros_like(w)
        for t, (g, n) in enumerate(zip(grads, norms, strict=True)):
            d = g[name] + (decay * w if name in decays else 0.0)
            buffer = mu * buffer + d
            direction = d + mu * buffer if nesterov else buffer
            ratio = 1.0
            if name in scaled:
                w_norm = math.sqrt(sum(x * x for x in w.ravel()))
                mean_norm = sum(n[name]) / len(n[name])
                ratio = min(cap, 1.0)
                if w_norm > 0 and mean_norm > 0:
                    ratio = min(cap, tc * w_norm / (mean_norm + eps))
            w = w - lr(t) * ratio * direction
        end[name] = w
    return end


def run(tx, params, grads, norms):
    params = jax.tree.map(jnp.float32, params)
    state, step = tx.init(params), jax.jit(tx.update)
    for g, n in zip(grads, norms, strict=True):
        g, n = jax.tree.map(jnp.float32, (g, n))
        updates, state = step(g, state, params, example_grad_norms=n)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(result, expected):
    for name, leaf in expected.items():
        np.testing.assert_allclose(result[name], leaf, rtol=2e-5, atol=1e-6, err_msg=name)


WEIGHTS = ("kernel", "zeros")
EVERY = tuple(SHAPES)


@pytest.mark.parametrize(
    ("arguments", "hand"),
    [
        ({}, {}),
        ({"momentum": 0.0}, {"mu": 0.0}),
        ({"nesterov": True, "momentum": 0.8}, {"nesterov": True, "mu": 0.8}),
        ({"weight_decay": 0.3}, {"decay": 0.3}),
        ({"weight_decay": 0.3, "weight_decay_mask": True}, {"decay": 0.3, "decays": EVERY}),
        ({"weight_decay": 0.3, "weight_decay_mask": None}, {"decay": 0.3, "decays": EVERY}),
        ({"trust_ratio_mask": True}, {"scaled": EVERY}),
        ({"trust_ratio_mask": None}, {"scaled": EVERY}),
        ({"trust_ratio_mask": False}, {"scaled": ()}),
        (
            {"trust_ratio_mask": {"kernel": False, "bias": True, "scale": False, "zeros": False}},
            {"scaled": ("bias",)},
        ),
        ({"trust_coefficient": 0.5}, {"tc": 0.5}),  # the cap is reached nearly everywhere
        ({"max_trust_ratio": 0.01}, {"cap": 0.01}),
        ({"max_trust_ratio": math.inf, "trust_coefficient": 0.5}, {"cap": math.inf, "tc": 0.5}),
        ({"eps": 2.0}, {"eps": 2.0}),
        (
            {"nesterov": True, "weight_decay": 0.1, "eps": 0.1, "max_trust_ratio": 0.012},
            {"nesterov": True, "decay": 0.1, "eps": 0.1, "cap": 0.012},
        ),
    ],
    ids=str,
)
def test_trajectories(arguments, hand):
    problem = draw(0)
    hand = {"decays": WEIGHTS, "scaled": WEIGHTS, **hand}
    expected = by_hand(*problem, lr=lambda t: 0.7, **hand)
    assert_close(run(clars_optax.clars(0.7, **arguments), *problem), expected)


def test_some_steps_reach_the_cap_and_some_do_not():
    params, _, norms = draw(0)
    ratios = [0.01 * np.linalg.norm(params["kernel"]) / np.mean(n["kernel"]) for n in norms]
    assert min(ratios) < 0.012 < max(ratios) < 0.1


def test_zero_norms():
    params, grads, norms = draw(1)
    norms = [{**n, "kernel": n["kernel"] * (t % 2)} for t, n in enumerate(norms)]
    expected = by_hand(params, grads, norms, lr=lambda t: 0.7, decays=(), scaled=WEIGHTS)
    assert_close(run(clars_optax.clars(0.7), params, grads, norms), expected)


def test_schedules():
    problem = draw(2)
    expected = by_hand(*problem, lr=lambda t: 0.5 * (1 - t / 6) ** 2, decays=(), scaled=WEIGHTS)
    schedule = optax.polynomial_schedule(0.5, 0.0, 2, 6)
    assert_close(run(clars_optax.clars(schedule), *problem), expected)
    constant = clars_optax.clars(schedule, weight_decay=optax.constant_schedule(0.3))
    plain = clars_optax.clars(schedule, weight_decay=0.3)
    assert_close(run(constant, *problem), run(plain, *problem))


def test_norms_may_be_means():
    params, grads, norms = draw(3)
    means = [jax.tree.map(np.mean, n) for n in norms]
    tx = clars_optax.clars(0.7)
    assert_close(run(tx, params, grads, means), run(tx, params, grads, norms))


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10_000),
    mu=st.floats(0, 0.99),
    nesterov=st.booleans(),
    decay=st.floats(0, 1),
    tc=st.floats(1e-4, 1),
    cap=st.floats(1e-3, 2),
    eps=st.floats(0, 1),
)
def test_random_trajectories(seed, mu, nesterov, decay, tc, cap, eps):
    problem = draw(seed, steps=3)
    expected = by_hand(*problem, lr=lambda t: 0.1, mu=mu, nesterov=nesterov, decay=decay, tc=tc,
                       cap=cap, eps=eps, decays=WEIGHTS, scaled=WEIGHTS)  # fmt: skip
    tx = clars_optax.clars(0.1, mu, nesterov, decay, clars_optax.default_mask, tc, cap, eps)
    assert_close(run(tx, *problem), expected)


def test_the_ratio_acts_outside_the_momentum_buffer():
    # A step with a tiny ratio leaves its gradient in the buffer, at full size, for the next one.
    w = np.eye(2, dtype=np.float32)
    tx = clars_optax.clars(1.0, momentum=0.5, max_trust_ratio=1.0, trust_coefficient=1.0)
    _, state = tx.update(w, tx.init(w), w, example_grad_norms=np.float32(1e9))
    updates, _ = tx.update(0 * w, state, w, example_grad_norms=np.float32(1e-9))
    np.testing.assert_allclose(updates, -0.5 * w)


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


@jax.jit
def gradient_and_norms(params, batch):
    examples = jax.tree.map(lambda x: x[:, None], batch)
    example_grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, examples)
    norms = jax.tree.map(
        lambda g: jnp.linalg.norm(g.reshape(g.shape[0], -1), axis=1), example_grads
    )
    return jax.grad(loss_fn)(params, batch), norms


def network(n=12):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "in": jax.random.normal(keys[0], (3, 4)),
        "bias": jnp.zeros(4),
        "out": jax.random.normal(keys[1], (4, 2)),
    }
    # Examples of very different sizes, so that the mini-batches have different norms.
    size = jnp.linspace(3.0, 0.3, n)[:, None]
    x, y = size * jax.random.normal(keys[2], (n, 3)), size * jax.random.normal(keys[3], (n, 2))
    return params, {"x": x, "y": y}


def distance(one, other):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, one, other)))


def test_multi_steps_hands_on_the_last_norms_only():
    params, batch = network()
    mini_batches = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch) for i in range(3)]
    tx = clars_optax.clars(1.0)

    grads, norms = gradient_and_norms(params, batch)
    right, _ = tx.update(grads, tx.init(params), params, example_grad_norms=norms)

    multi = optax.MultiSteps(tx, every_k_schedule=3)
    state, multi_update = multi.init(params), jax.jit(multi.update)
    for mini_batch in mini_batches:
        mini_grads, last_norms = gradient_and_norms(params, mini_batch)
        trapped, state = multi_update(mini_grads, state, params, example_grad_norms=last_norms)
    for name in ("in", "out"):
        assert distance(trapped[name], right[name]) > 0.2 * optax.tree.norm(right[name])
    explained, _ = tx.update(grads, tx.init(params), params, example_grad_norms=last_norms)
    assert distance(trapped, explained) < 1e-5

    # What `microbatch_size` does instead: the norms of all micro-batches, and one update.
    parts = [gradient_and_norms(params, mini_batch) for mini_batch in mini_batches]
    grads = jax.tree.map(lambda *g: sum(g) / 3, *(g for g, _ in parts))
    norms = jax.tree.map(lambda *n: jnp.concatenate(n), *(n for _, n in parts))
    updates, _ = tx.update(grads, tx.init(params), params, example_grad_norms=norms)
    assert distance(updates, right) < 1e-5


def test_multi_steps_as_a_transformation_drops_the_norms_and_says_so():
    params, batch = network()
    grads, norms = gradient_and_norms(params, batch)
    multi = optax.MultiSteps(clars_optax.clars(1.0), 3).gradient_transformation()
    tx = optax.chain(multi)
    with pytest.raises(ValueError, match=r"drops extra arguments.*`optax\.chain`"):
        tx.update(grads, tx.init(params), params, example_grad_norms=norms)


def test_converges():
    params, batch = network()
    tx = clars_optax.clars(optax.cosine_decay_schedule(3.0, 150), trust_ratio_mask=True)

    @jax.jit
    def step(params, state):
        grads, norms = gradient_and_norms(params, batch)
        updates, state = tx.update(grads, state, params, example_grad_norms=norms)
        return optax.apply_updates(params, updates), state

    before, state = loss_fn(params, batch), tx.init(params)
    for _ in range(150):
        params, state = step(params, state)
    assert loss_fn(params, batch) < 0.2 * before


def test_finds_the_minimum_of_a_quadratic():
    target = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    params, tx = jnp.ones((2, 2)), clars_optax.clars(optax.cosine_decay_schedule(1.0, 200))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(200):
        grad = params - target
        norm = jnp.linalg.norm(grad)
        updates, state = update(grad, state, params, example_grad_norms=norm)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, target, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": -0.9}, ValueError, "`momentum` is -0.9: expected is a number of at least 0"),
        ({"momentum": math.nan}, ValueError, "`momentum` is nan"),
        ({"weight_decay": -1e-4}, ValueError, "`weight_decay` is -0.0001"),
        ({"weight_decay": "0.1"}, TypeError, "`weight_decay` is of type str"),
        ({"learning_rate": None}, TypeError, "`learning_rate` is None"),
        ({"nesterov": "no"}, TypeError, "`nesterov` is 'no': expected is True or False"),
        ({"nesterov": None}, TypeError, "`nesterov` is None"),
    ],
)
def test_options_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        clars_optax.clars(**{"learning_rate": 0.1, **options})


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"other": True}, ValueError, r"only `{}` has \['other'\], only `params` has \['w'\]"),
        ("no", TypeError, "at the root is of type str: expected is a Python boolean"),
        (lambda p: {"w": 1}, TypeError, r"at \['w'\] is of type int: expected is a Python boolean"),
    ],
)
def test_masks_that_do_not_fit(mask, error, message):
    names = ["trust_ratio_mask"]
    if mask is not None:  # In Optax, all weights decay without a mask.
        names.append("weight_decay_mask")
    for name in names:
        tx = clars_optax.clars(0.1, **{name: mask})
        with pytest.raises(error, match=f"^`{name}` .*{message.format(name)}"):
            tx.init({"w": jnp.ones((2, 2))})


def test_the_state_of_other_parameters_is_refused():
    params, norms = {"w": jnp.ones((2, 2))}, {"w": jnp.ones(3)}
    tx = clars_optax.clars(0.1)
    for other, message in (
        (
            {"w": jnp.ones(2)},
            r"`updates` at \['w'\] has shape \(2, 2\), but `state` has shape \(2,\)",
        ),
        ({"v": jnp.ones(2)}, r"only `updates` has \['w'\], only `state` has \['v'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(params, tx.init(other), params, example_grad_norms=norms)
    for state in (None, (), optax.EmptyState(), optax.sgd(0.1, 0.9).init(params)):
        with pytest.raises(ValueError, match=r"^`state` is of type .*`tx\.init\(params\)`"):
            tx.update(params, state, params, example_grad_norms=norms)


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "weight_decay"])
def test_rates_that_are_no_scalars(name):
    with pytest.raises(TypeError, match=rf"^`{name}` is float32\[2\]: expected is a number"):
        clars_optax.clars(**{"learning_rate": 0.1, name: jnp.ones(2)})
