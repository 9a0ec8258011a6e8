"""What does not fit is refused before anything is traced, and the message says what would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clars_optax
from tests.norms.models import normal

PARAMS = {"w": normal(0, 4, 3)}
BATCH = {"x": normal(1, 6, 4), "y": normal(2, 6, 3)}


RAW_KEY = jax.random.PRNGKey(0)


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"argnums": "w"}, TypeError, "argnums must be an int or a tuple of ints, got 'w'"),
        ({"argnums": ()}, ValueError, "argnums is empty"),
        ({"batch_argnums": (1.0,)}, TypeError, r"batch_argnums must be an int.*\(1.0,\)"),
        ({"batch_argnums": ()}, ValueError, "batch_argnums is empty"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
        ({"group_size": 2.0}, TypeError, "group_size must be an int, got 2.0"),
        ({"group_size": None}, TypeError, "group_size must be an int, got None"),
        ({"num_norm_examples": -4}, ValueError, "num_norm_examples must be at least 0"),
        ({"microbatch_size": True}, TypeError, "microbatch_size must be an int, got True"),
        (
            {"microbatch_size": 3, "group_size": 2},
            ValueError,
            "microbatch_size=3 must be a multiple of group_size=2",
        ),
        (
            {"num_norm_examples": 5, "group_size": 2},
            ValueError,
            "num_norm_examples=5 must be a multiple of group_size=2",
        ),
        ({"loss_reduction": "max"}, ValueError, r"loss_reduction must be one of .*'max'"),
        (
            {"loss_reduction": np.array(["mean", "sum"])},
            ValueError,
            r"loss_reduction must be one of .*, got array",
        ),
        ({"has_aux": "no"}, TypeError, "has_aux must be True or False, got 'no'"),
        ({"method": "fast"}, ValueError, r"method must be one of .*'generic'.*'fast'"),
    ],
    ids=str,
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        clars_optax.value_and_grad_and_norms(loss_fn, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"argnums": 2}, "argnums names argument 2, but the call has 2 positional arguments"),
        ({"batch_argnums": -3}, "batch_argnums names argument -3"),
        ({"batch_argnums": 0}, "Argument 0 is in batch_argnums and in argnums"),
        ({"batch_argnums": (1, -1)}, "batch_argnums names argument 1 twice"),
        ({"rng_argnums": 1}, "Argument 1 is in rng_argnums and in batch_argnums"),
        ({"group_size": 4}, "group_size=4 does not divide the batch of 6 examples; 1, 2, 3, 6"),
        ({"microbatch_size": 4}, "microbatch_size=4 does not divide the batch of 6 examples"),
        ({"num_norm_examples": 7}, "num_norm_examples=7 is more than the batch of 6 examples"),
    ],
    ids=str,
)
def test_options_against_the_call(options, message):
    step = clars_optax.value_and_grad_and_norms(loss_fn, **options)
    with pytest.raises(ValueError, match=message):
        step(PARAMS, BATCH)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": BATCH["x"], "y": BATCH["y"][:5]}, r"args\[1\]\['x'\] has 6 .*\['y'\] has 5"),
        ({**BATCH, "scale": 2.0}, r"args\[1\]\['scale'\] is a scalar"),
        ({}, "hold no arrays"),
        (jax.tree.map(lambda x: x[:0], BATCH), "batch is empty"),
    ],
    ids=["disagreeing", "scalar", "no_arrays", "empty"],
)
def test_batch(batch, message):
    with pytest.raises(ValueError, match=message):
        clars_optax.value_and_grad_and_norms(loss_fn)(PARAMS, batch)


@pytest.mark.parametrize(
    "leaf", [jnp.arange(3), jnp.ones(3, jnp.complex64), jnp.ones(3, bool), 3, "three"], ids=repr
)
def test_parameters_without_gradient(leaf):
    step = clars_optax.value_and_grad_and_norms(loss_fn)
    with pytest.raises(TypeError, match=r"floating-point parameters.*args\[0\]\['other'\]"):
        step({**PARAMS, "other": leaf}, BATCH)


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_keys_that_micro_batches_would_share(key):
    def dropout_loss(params, batch, rngs):
        kept = jax.random.bernoulli(rngs["dropout"], 0.5, batch["x"].shape)
        return loss_fn(params, {**batch, "x": batch["x"] * kept})

    step = clars_optax.value_and_grad_and_norms(dropout_loss, microbatch_size=3)
    with pytest.raises(ValueError, match=r"args\[2\]\['dropout'\] is a random key.*rng_argnums"):
        step(PARAMS, BATCH, {"dropout": key})


@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_keys_that_a_loss_closes_over(key, is_inside):
    def drop(x):
        return x * jax.random.bernoulli(key, 0.5, x.shape)

    def loss(params, batch):
        return loss_fn(params, {**batch, "x": (jax.jit(drop) if is_inside else drop)(batch["x"])})

    clars_optax.value_and_grad_and_norms(loss)(PARAMS, BATCH)
    step = clars_optax.value_and_grad_and_norms(loss, microbatch_size=3)
    with pytest.raises(ValueError, match=r"closes over a random key.*rng_argnums"):
        step(PARAMS, BATCH)


def test_keys_that_reach_nothing_may_be_closed_over():
    def loss(params, batch):
        jax.random.split(jax.random.wrap_key_data(RAW_KEY))
        return loss_fn(params, batch)

    clars_optax.value_and_grad_and_norms(loss, microbatch_size=3)(PARAMS, BATCH)


def test_divisors_that_would_do_are_near_and_whole_groups():
    batch = {"x": jnp.ones((720, 4)), "y": jnp.ones((720, 3))}
    step = clars_optax.value_and_grad_and_norms(loss_fn, group_size=4, microbatch_size=28)
    with pytest.raises(ValueError, match=r"720 examples; 8, 12, 16, 20, 24, 36, 40, 48 would"):
        step(PARAMS, batch)


@pytest.mark.parametrize("leaf", [np.array(list("abcdef")), np.array([None] * 6), np.longdouble(1)])
@pytest.mark.parametrize("position", [0, 1])
def test_leaves_that_jax_cannot_hold(leaf, position):
    args = [dict(PARAMS), dict(BATCH)]
    args[position]["other"] = leaf
    with pytest.raises(TypeError, match=rf"args\[{position}\]\['other'\] (is of|has the) type"):
        clars_optax.value_and_grad_and_norms(loss_fn)(*args)


@pytest.mark.parametrize(
    ("rng", "message"),
    [
        (3.0, r"args\[2\] is of type float, but .* single random key"),
        ("key", r"args\[2\] is of type str, "),
        (jnp.arange(2), r"args\[2\] is of type .* and shape \(2,\), but "),
        (jax.random.split(jax.random.key(0)), r"args\[2\] is of type .* and shape \(2,\)"),
        (jax.random.split(jax.random.PRNGKey(0)), r"args\[2\] is of type .* and shape \(2, 2\)"),
    ],
)
def test_micro_batches_need_single_keys(rng, message):
    def loss(params, batch, rng):
        return loss_fn(params, batch)

    step = clars_optax.value_and_grad_and_norms(loss, rng_argnums=2, microbatch_size=3)
    with pytest.raises(TypeError, match=message):
        step(PARAMS, BATCH, rng)


def test_arrays_of_raw_keys_are_keys():
    def loss(params, batch, rngs):
        return loss_fn(params, batch)

    step = clars_optax.value_and_grad_and_norms(loss, microbatch_size=3)
    with pytest.raises(ValueError, match=r"args\[2\] is a random key, or looks like one"):
        step(PARAMS, BATCH, jax.random.split(jax.random.PRNGKey(0), 3))


@pytest.mark.parametrize(
    ("loss", "has_aux", "message"),
    [
        (lambda p, b: None, False, "scalar, got NoneType; .*has_aux=True"),
        (lambda p, b: "x", True, "pair of the loss and auxiliary data, got str"),
        (lambda p, b: {"loss": jnp.sum(p["w"])}, False, "scalar, got dict"),
        (
            lambda p, b: (jnp.sum(p["w"]), {"a": ["x"]}),
            True,
            r"aux\['a'\]\[0\] is str.*arrays only",
        ),
        (lambda p, b: b["x"] @ p["w"], False, r"scalar, got float32\[6, 3\].*has_aux=True"),
        (lambda p, b: jnp.argmax(p["w"]), False, "floating-point scalar, got int32"),
        (lambda p, b: jnp.sum(p["w"]), True, "must return a pair of the loss and auxiliary data"),
        (lambda p, b: (b["x"][0], 0), True, r"scalar, got float32\[4\]\."),
    ],
)
@pytest.mark.parametrize("size", [None, 2])
def test_what_the_loss_returns(loss, has_aux, message, size):
    step = clars_optax.value_and_grad_and_norms(loss, has_aux=has_aux, microbatch_size=size)
    with pytest.raises(TypeError, match=message):
        step(PARAMS, BATCH)


@pytest.mark.parametrize("size", [None, 2])
def test_what_a_loss_raises_is_raised(size):
    step = clars_optax.value_and_grad_and_norms(lambda p, b: p["no"], microbatch_size=size)
    with pytest.raises(KeyError, match="no"):
        step(PARAMS, BATCH)


def test_several_arguments():
    """Trees of parameters at several positions, from the end too, and a batch in two arguments."""

    def loss(x, w, y, b, *, power):
        return jnp.mean((x @ w["w"] + b - y) ** power)

    b = normal(3, 3)
    step = clars_optax.value_and_grad_and_norms(loss, argnums=(-1, 1), batch_argnums=(0, 2))
    value, grads, norms = step(BATCH["x"], PARAMS, BATCH["y"], b, power=2)
    expected = jax.value_and_grad(loss, argnums=(3, 1))(BATCH["x"], PARAMS, BATCH["y"], b, power=2)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(expected[1])
    assert jax.tree.structure(norms) == jax.tree.structure(expected[1])
    residuals = 2 * (BATCH["x"] @ PARAMS["w"] + b - BATCH["y"]) / 3
    np.testing.assert_allclose(norms[0], jnp.linalg.norm(residuals, axis=1), rtol=1e-5)
    np.testing.assert_allclose(
        norms[1]["w"],
        jnp.linalg.norm(residuals, axis=1) * jnp.linalg.norm(BATCH["x"], axis=1),
        rtol=1e-5,
    )


def test_scalar_and_numpy_parameters():
    def loss(params, x):
        return jnp.mean(params["scale"] * x @ params["w"])

    x = np.asarray(BATCH["x"])
    params = {"scale": 2.0, "w": np.ones(4, np.float32)}
    _, grads, norms = clars_optax.value_and_grad_and_norms(loss)(params, x)
    np.testing.assert_allclose(grads["scale"], x.sum() / 6, rtol=1e-5)
    np.testing.assert_allclose(norms["scale"], np.abs(x.sum(1)), rtol=1e-5)
    np.testing.assert_allclose(norms["w"], 2 * np.linalg.norm(x, axis=1), rtol=1e-5)


def test_one_example():
    batch = jax.tree.map(lambda x: x[:1], BATCH)
    value, grads, norms = clars_optax.value_and_grad_and_norms(loss_fn)(PARAMS, batch)
    expected = jax.value_and_grad(loss_fn)(PARAMS, batch)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(norms["w"], [jnp.linalg.norm(expected[1]["w"])], rtol=1e-6)
    np.testing.assert_allclose(grads["w"], expected[1]["w"], rtol=1e-6)
