"""`scale_by_clars`: the edge-case table, how norms meet parameters, and every error."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import strategies as st

import clars_optax

W = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)  # of norm 5


def ratio(param, norm, **kwargs):
    """The factor that an update of ones is multiplied with."""
    tx = clars_optax.scale_by_clars(**kwargs)
    update = jnp.ones_like(param)
    scaled, state = tx.update(update, tx.init(param), param, example_grad_norms=norm)
    assert state == optax.EmptyState()
    assert scaled.dtype == update.dtype
    assert np.isnan(scaled).all() or (scaled == scaled.ravel()[0]).all()
    return float(scaled.ravel()[0])


@pytest.mark.parametrize(
    ("param", "norm", "kwargs", "expected"),
    [
        # The formula, below the cap and above it.
        (W, [1.0, 3.0], {}, 0.01 * 5 / 2),
        (W, [0.1, 0.3], {}, 0.1),
        (W, [0.1, 0.3], {"max_trust_ratio": math.inf}, 0.01 * 5 / 0.200001),
        (W, [1.0, 3.0], {"trust_coefficient": 0.02, "eps": 3.0}, 0.02 * 5 / 5),
        (W, 2.0, {}, 0.01 * 5 / 2),
        # Zero norms: min(max_trust_ratio, 1).
        (0 * W, [1.0, 3.0], {}, 0.1),
        (0 * W, [1.0, 3.0], {"max_trust_ratio": 7.0}, 1.0),
        (W, [0.0, 0.0], {}, 0.1),
        (W, [0.0, 0.0], {"max_trust_ratio": 7.0}, 1.0),
        (W, 0.0, {"max_trust_ratio": math.inf, "eps": 0.0}, 1.0),
        (0 * W, [0.0, 0.0], {"max_trust_ratio": 7.0, "eps": 0.0}, 1.0),
        # Never hidden: not by the minimum, not by a division by infinity, not by zero weights.
        (W, [1.0, math.nan], {}, math.nan),
        (W, [1.0, math.inf], {}, math.nan),
        (W, math.inf, {"max_trust_ratio": math.inf}, math.nan),
        (0 * W, [1.0, math.nan], {}, math.nan),
        (0 * W, math.inf, {}, math.nan),
        # Norms are not negative, and a mean does not hide that one is.
        (W, [3.0, -1.0], {}, math.nan),
        (W, -1.0, {}, math.nan),
    ],
)
def test_edge_cases(param, norm, kwargs, expected):
    norm = np.float32(norm)
    np.testing.assert_allclose(ratio(param, norm, **kwargs), expected, rtol=2e-6)


def test_masked_leaves_pass_unchanged():
    tx = clars_optax.scale_by_clars()
    updates = {"a": optax.MaskedNode(), "b": np.ones(2, np.float32), "c": None}
    params = {"a": optax.MaskedNode(), "b": np.ones(2, np.float32), "c": None}
    norms = {"a": np.float32(math.nan), "b": np.float32(1.0), "c": np.float32(1.0)}
    new, _ = tx.update(updates, tx.init(params), params, example_grad_norms=norms)
    assert new["a"] == optax.MaskedNode()
    assert new["c"] is None
    np.testing.assert_allclose(new["b"], [0.01 * math.sqrt(2)] * 2, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_leaves_have_float32_norms_and_ratio(dtype):
    # The square of 300 overflows in float16, and bfloat16 would round 1.001 to 1.
    param = jnp.full((1000,), 300.0, dtype)
    update = jnp.full((1000,), 3.0, dtype)
    tx = clars_optax.scale_by_clars(max_trust_ratio=math.inf)
    norms = jnp.full((4,), 1.001, jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        new, _ = tx.update(update, tx.init(param), param, example_grad_norms=norms)
    assert new.dtype == dtype
    exact = 3.0 * 0.01 * 300 * math.sqrt(1000) / (1.001 + 1e-6)
    np.testing.assert_array_equal(np.float32(new), np.float32(jnp.asarray(exact, dtype)))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 5),
    st.integers(0, 10_000),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([0.1, 1.0, math.inf]),
)
def test_random_leaves(shape, n, seed, size, cap):
    rng = np.random.default_rng(seed)
    w, g = size * rng.normal(size=shape), rng.normal(size=shape)
    norms = rng.uniform(0.1, 2.0, size=n)
    tx = clars_optax.scale_by_clars(max_trust_ratio=cap)
    new, _ = tx.update(
        jnp.asarray(g, jnp.float32), tx.init(w), w, example_grad_norms=np.float32(norms)
    )
    expected = g * min(cap, 0.01 * math.sqrt(float(np.sum(w * w))) / (sum(norms) / n + 1e-6))
    np.testing.assert_allclose(new, expected, rtol=1e-5)


def test_the_ratio_has_a_gradient_where_norms_are_zero():
    tx = clars_optax.scale_by_clars(eps=0.0)

    def total(params, norm):
        new, _ = tx.update(jnp.ones(2), optax.EmptyState(), params, example_grad_norms=norm)
        return jnp.sum(new)

    by_params, by_norm = jax.grad(total, argnums=(0, 1))(jnp.zeros(2), 0.0)
    assert np.isfinite(by_params).all()
    assert np.isfinite(by_norm)


PARAMS = {"a": {"kernel": W, "bias": W[0]}, "head": W}
UPDATES = jax.tree.map(np.ones_like, PARAMS)
NORMS = jax.tree.map(lambda p: np.float32([1.0, 2.0]), PARAMS)
MASK = optax.MaskedNode()


ONLY_KERNEL = {"a": {"kernel": W, "bias": MASK}, "head": MASK}


@pytest.mark.parametrize(
    ("params", "norms"),
    [
        (ONLY_KERNEL, NORMS),
        (ONLY_KERNEL, {"a": {"kernel": np.float32(1.5), "bias": MASK}, "head": MASK}),
        (ONLY_KERNEL, {"a": {"kernel": 1.5, "bias": None}, "head": {"any": W, "thing": None}}),
        (ONLY_KERNEL, {"a": {"kernel": np.float32([1.5])}}),
        (ONLY_KERNEL, freeze(NORMS)),
        ({"a": {"kernel": W, "bias": None}, "head": None}, NORMS),
        # A prefix mask puts one MaskedNode in the place of a whole subtree.
        ({"a": MASK, "head": W}, NORMS),
        ({"a": MASK, "head": W}, {"a": MASK, "head": np.float32(1.5)}),
        (MASK, NORMS),
    ],
)
def test_norms_of_masked_leaves_are_ignored(params, norms):
    tx = clars_optax.scale_by_clars()
    updates = jax.tree.map(np.ones_like, params)
    new, _ = tx.update(updates, tx.init(params), params, example_grad_norms=norms)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for leaf in jax.tree.leaves(new):
        np.testing.assert_allclose(leaf, 0.01 * 5 / 1.5 * np.ones((2, 2)), rtol=1e-5)


def test_an_update_that_is_none_needs_no_norm():
    tx = clars_optax.scale_by_clars()
    updates = {"a": None, "head": np.ones_like(W)}
    params = {"a": W, "head": W}
    norms = {"a": None, "head": np.float32(1.5)}
    new, _ = tx.update(updates, tx.init(params), params, example_grad_norms=norms)
    assert new["a"] is None
    np.testing.assert_allclose(new["head"], 0.01 * 5 / 1.5 * np.ones((2, 2)), rtol=1e-5)


def test_boxed_variables_match_bare_arrays():
    params = nnx.State({"kernel": nnx.Param(jnp.asarray(W))})
    updates = jax.tree.map(jnp.ones_like, params)
    tx = clars_optax.scale_by_clars()
    norms = nnx.State({"kernel": jnp.float32(1.5)})
    new, _ = tx.update(updates, tx.init(params), params, example_grad_norms=norms)
    np.testing.assert_allclose(new["kernel"][...], 0.01 * 5 / 1.5 * np.ones((2, 2)), rtol=1e-5)


def update(norms, params=PARAMS):
    tx = clars_optax.scale_by_clars()
    return tx.update(UPDATES, tx.init(PARAMS), params, example_grad_norms=norms)


def test_missing_params():
    with pytest.raises(ValueError, match=r"`params` is missing.*tx\.update\(grads, state, params"):
        update(NORMS, params=None)


def test_missing_norms():
    message = (
        r"`example_grad_norms` is missing.*clars_optax\.value_and_grad_and_norms.*"
        r"TrainState\.apply_gradients.*optax\.chain"
    )
    with pytest.raises(ValueError, match=message):
        update(None)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"a": NORMS["a"]}, r"no norm for \['head'\]\. It must be a tree like `params`"),
        ({"a": {"kernel": W[0]}}, r"no norm for \['a'\]\['bias'\], \['head'\]"),
        ({**NORMS, "a": MASK}, r"no norm for \['a'\]\['bias'\], \['a'\]\['kernel'\]\. "),
        ({**NORMS, "head": MASK}, r"no norm for \['head'\]"),
        ({**NORMS, "head": None}, r"no norm for \['head'\]"),
        ({**NORMS, "head": {"kernel": W[0]}}, r"no norm for \['head'\] \(.* is of type dict\)\."),
        ({**NORMS, "head": [1.0, 2.0]}, r"no norm for \['head'\] \(.* is of type list\)\."),
        (W[0], r"no norm for \['a'\]\['bias'\], \['a'\]\['kernel'\], \['head'\]"),
    ],
)
def test_no_norm_for_a_live_leaf(norms, message):
    with pytest.raises(ValueError, match=message):
        update(norms)


def test_names_of_many_missing_leaves_are_cut_short():
    params = [W] * 20
    with pytest.raises(ValueError, match=r"\[0\], \[1\], .*, \[7\], and 12 more\."):
        clars_optax.scale_by_clars().update(
            params, optax.EmptyState(), params, example_grad_norms=[]
        )


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (np.ones((8, 2, 2), np.float32), r"\['head'\] has shape \(8, 2, 2\).*from_example_grads"),
        (np.ones((0,), np.float32), r"\['head'\] has shape \(0,\): expected is a vector"),
        (np.ones(8, np.int32), r"\['head'\] has dtype int32.*floating-point"),
        (np.ones(8, bool), r"\['head'\] has dtype bool"),
        (np.ones(8, np.complex64), r"\['head'\] has dtype complex64"),
        (3, r"\['head'\] has dtype int32"),
    ],
)
def test_norms_of_a_wrong_kind(norm, message):
    with pytest.raises(TypeError if "dtype" in message else ValueError, match=message):
        update({**NORMS, "head": norm})


def test_the_root_has_a_name():
    tx = clars_optax.scale_by_clars()
    with pytest.raises(ValueError, match="`example_grad_norms` at the root has shape"):
        tx.update(W, tx.init(W), W, example_grad_norms=W)


@pytest.mark.parametrize("name", ["trust_coefficient", "max_trust_ratio", "eps"])
@pytest.mark.parametrize("value", [-1.0, -1, math.nan, np.float32(-1.0)])
def test_arguments_below_zero(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}: expected is a number of at least"):
        clars_optax.scale_by_clars(**{name: value})
    with pytest.raises(ValueError, match=f"`{name}` is {value}"):
        clars_optax.clars(0.1, **{name: value})


def test_traced_arguments_are_not_checked():
    def f(eps):
        tx = clars_optax.scale_by_clars(eps=eps, max_trust_ratio=10.0)
        return tx.update(W, optax.EmptyState(), W, example_grad_norms=np.float32(1.0))[0]

    np.testing.assert_allclose(jax.jit(f)(1.0), W * 0.01 * 5 / 2, rtol=1e-6)


@pytest.mark.parametrize("value", ["1", (1.0,), np.ones(2), 1j, True, None])
@pytest.mark.parametrize("name", ["trust_coefficient", "max_trust_ratio", "eps"])
def test_arguments_that_are_no_scalars(name, value):
    with pytest.raises(TypeError, match=f"^`{name}` is .*: expected is a number"):
        clars_optax.scale_by_clars(**{name: value})


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        # The imaginary part was dropped, the fraction cut off, the vector broadcast.
        (np.ones((2, 2), np.complex64), TypeError, r"is complex64\[2, 2\]: expected is a real"),
        (np.ones((2, 2), np.int32), TypeError, r"is int32\[2, 2\]: expected is a real"),
        (W[0], ValueError, r"has shape \(2,"),
        ({"deeper": W}, ValueError, r"different trees: .*\['deeper'\]"),
    ],
    ids=["complex", "integer", "shape", "subtree"],
)
@pytest.mark.parametrize("which", ["updates", "params"])
@pytest.mark.parametrize("tx", [clars_optax.scale_by_clars(), clars_optax.clars(0.1)])
def test_updates_that_do_not_fit(tx, which, leaf, error, message):
    trees = {"updates": UPDATES, "params": PARAMS}
    trees[which] = {**trees[which], "head": leaf}
    with pytest.raises(error, match=message) as raised:
        tx.update(trees["updates"], tx.init(PARAMS), trees["params"], example_grad_norms=NORMS)
    assert "['head']" in str(raised.value)


def test_the_paths_that_two_trees_do_not_share():
    tx = clars_optax.scale_by_clars()
    message = r"different trees: only `updates` has \['head'\], only `params` has \['tail'\]\. "
    with pytest.raises(ValueError, match=message):
        tx.update(
            {"head": W}, tx.init(W), {"tail": W}, example_grad_norms={"head": np.float32(1.0)}
        )
