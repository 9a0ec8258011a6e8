"""`diagnostics` against formulas in NumPy on explicit per-example gradients."""

from typing import Any

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import clars_optax


def draw(seed, n, signal=1.0):
    """Parameters, and per-example gradients that are a common part and noise."""
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=(4,))}
    example_grads = {
        name: signal * rng.normal(size=w.shape) + rng.normal(size=(n, *w.shape))
        for name, w in params.items()
    }
    return params, example_grads


def group(example_grads, size):
    return {name: g.reshape(-1, size, *g.shape[1:]).mean(1) for name, g in example_grads.items()}


def norms_of(grads):
    return {
        name: np.float32([np.sqrt(np.sum(g_i * g_i)) for g_i in g]) for name, g in grads.items()
    }


def means_of(grads):
    return {name: np.float32(g.mean(0)) for name, g in grads.items()}


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 5), st.sampled_from([0.5, 3.0])
)
def test_formulas(seed, size, n_groups, signal):
    params, example_grads = draw(seed, size * n_groups, signal)
    groups, n = group(example_grads, size), size * n_groups
    result = clars_optax.diagnostics(
        params, means_of(groups), norms_of(groups), batch_size=n, group_size=size
    )
    assert isinstance(result, clars_optax.Diagnostics)
    for name, g in groups.items():
        mean = sum(g) / n_groups
        second_moment = sum(np.sum(g_i**2) for g_i in g) / n_groups
        variance = sum(np.sum((g_i - mean) ** 2) for g_i in g) / n_groups
        # S from the sample variance with Bessel's correction, |G|^2 from products of different
        # groups: the same estimates, arrived at in another way.
        s = size * variance * n_groups / (n_groups - 1)
        g2 = sum(np.sum(g[i] * g[j]) for i in range(n_groups) for j in range(n_groups) if i != j)
        g2 /= n_groups * (n_groups - 1)
        mean_norm = sum(np.linalg.norm(g_i) for g_i in g) / n_groups
        ratio = min(0.1, 0.01 * np.linalg.norm(params[name]) / (mean_norm + 1e-6))
        expected = clars_optax.Diagnostics(
            trust_ratio=ratio if name == "kernel" else 1.0,
            variance_factor=second_moment / np.sum(mean**2),
            signal_to_noise_ratio=np.sum(mean**2) / variance,
            noise_scale=s / g2,
        )
        for field, got, want in zip(expected._fields, result, expected, strict=True):
            assert got[name].dtype == jnp.float32
            assert got[name].shape == ()
            # The estimate of |G|^2 is a difference, and its inverse as uncertain as it is small.
            rtol = 1e-3 * max(1.0, abs(want / n)) if field == "noise_scale" else 1e-4
            np.testing.assert_allclose(got[name], want, rtol=rtol, err_msg=field)
        factor, snr = result.variance_factor[name], result.signal_to_noise_ratio[name]
        np.testing.assert_allclose(snr, 1 / (factor - 1), rtol=1e-3)


def test_noise_scale_of_known_noise():
    # G = (3, 4) / 5 * 2 and noise of variance 0.5 in each of 40 coordinates: S = 20, |G|^2 = 4.
    rng = np.random.default_rng(0)
    signal = np.zeros(40)
    signal[:2] = [1.2, 1.6]
    for size in (1, 8):
        grads = {"w": signal + np.sqrt(0.5) * rng.normal(size=(4000, 40))}
        groups = group(grads, size)
        result = clars_optax.diagnostics(
            {"w": signal}, means_of(grads), norms_of(groups), batch_size=4000, group_size=size
        )
        np.testing.assert_allclose(result.noise_scale["w"], 5.0, rtol=0.05)
        np.testing.assert_allclose(result.variance_factor["w"], 1 + 5 / size, rtol=0.05)
        np.testing.assert_allclose(result.signal_to_noise_ratio["w"], size / 5, rtol=0.05)


def test_pure_noise_stays_at_the_limits_that_the_batch_sets():
    kernels = np.random.default_rng(1).normal(size=(8, 4000))
    groups = group({"w": kernels}, 2)
    result = clars_optax.diagnostics(
        {"w": kernels[0]}, means_of(groups), norms_of(groups), batch_size=8, group_size=2
    )
    np.testing.assert_allclose(result.variance_factor["w"], 8 / 2, rtol=0.1)
    np.testing.assert_allclose(result.signal_to_noise_ratio["w"], 2 / (8 - 2), rtol=0.1)


def test_norms_of_a_part_of_the_batch():
    params, example_grads = draw(0, 12)
    part = {name: g[:4] for name, g in example_grads.items()}
    result = clars_optax.diagnostics(params, means_of(example_grads), norms_of(part), batch_size=12)
    big = np.sum(example_grads["kernel"].mean(0) ** 2)
    small = np.mean([np.sum(g**2) for g in part["kernel"]])
    np.testing.assert_allclose(result.variance_factor["kernel"], small / big, rtol=1e-4)
    noise_scale = ((small - big) / (1 - 1 / 12)) / ((12 * big - small) / 11)
    np.testing.assert_allclose(result.noise_scale["kernel"], noise_scale, rtol=1e-4)


def test_means_of_norms_and_of_their_squares_are_enough():
    params, example_grads = draw(3, 8)
    norms, grads = norms_of(example_grads), means_of(example_grads)
    expected = clars_optax.diagnostics(params, grads, norms, batch_size=8)

    found = clars_optax.diagnostics(
        params,
        grads,
        jax.tree.map(jnp.mean, norms),
        mean_square_norms=jax.tree.map(lambda n: jnp.mean(n**2), norms),
        batch_size=8,
    )

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_trust_ratio_is_the_one_of_clars():
    params, example_grads = draw(0, 6)
    grads, norms = means_of(example_grads), norms_of(example_grads)
    for arguments in (
        {"trust_coefficient": 0.03, "eps": 0.5},
        {"max_trust_ratio": 0.001},
        {"trust_ratio_mask": True},
        {"trust_ratio_mask": {"kernel": False, "bias": True}},
        {"trust_ratio_mask": lambda p: {"kernel": False, "bias": True}},
    ):
        result = clars_optax.diagnostics(params, grads, norms, batch_size=6, **arguments)
        tx = clars_optax.clars(1.0, momentum=0.0, **arguments)
        updates, _ = tx.update(grads, tx.init(params), params, example_grad_norms=norms)
        for name, u in updates.items():
            np.testing.assert_allclose(u, -result.trust_ratio[name] * grads[name], rtol=1e-5)


def of_leaf(grad, norms, batch_size, **kwargs):
    param, grad = jnp.ones((2, 2)), jnp.full((2, 2), grad)
    return clars_optax.diagnostics(param, grad, jnp.float32(norms), batch_size=batch_size, **kwargs)


def test_edge_cases():
    one_size = of_leaf(1.0, [2.0], 4, group_size=4)
    assert np.isnan(one_size.noise_scale)
    assert one_size.variance_factor == 1

    no_noise = of_leaf(1.0, [2.0, 2.0], 2)
    assert no_noise[1:] == (1.0, np.inf, 0.0)

    below_zero = of_leaf(1.0, [1.0, 1.0], 4)
    assert below_zero.signal_to_noise_ratio == np.inf
    assert below_zero.noise_scale < 0

    nothing = of_leaf(0.0, [0.0, 0.0], 2)
    np.testing.assert_allclose(nothing.trust_ratio, 0.1, rtol=1e-6)
    assert all(np.isnan(x) for x in nothing[1:])

    more_noise_than_signal = of_leaf(0.1, [2.0, 2.0], 2)
    assert more_noise_than_signal.noise_scale < 0


def test_low_precision_is_computed_in_float32():
    result = clars_optax.diagnostics(
        jnp.full(300, 1.0, jnp.bfloat16), jnp.full(300, 1.0, jnp.bfloat16),
        jnp.full(4, 2 * np.sqrt(300.0)), batch_size=4,
    )  # fmt: skip
    np.testing.assert_allclose(result.variance_factor, 4.0, rtol=1e-6)
    assert {x.dtype for x in result} == {jnp.dtype(jnp.float32)}


def test_trees_may_be_of_any_kind():
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    norms = jax.tree.map(lambda p: jnp.ones(4), params)
    result = clars_optax.diagnostics(params, params, norms, batch_size=4)
    for field in result:
        assert jax.tree.structure(field) == jax.tree.structure(params)


def test_an_empty_tree_and_masked_leaves_stay():
    assert clars_optax.diagnostics({}, {}, {}, batch_size=4) == ({}, {}, {}, {})
    masked = optax.MaskedNode()
    params = {"w": np.ones((2, 2)), "masked": masked, "none": None}
    grads, norms = jax.tree.map(np.ones_like, params), {"w": np.ones(4)}
    for others in ({"masked": masked, "none": None}, {"masked": np.ones(2), "none": np.ones(2)}):
        result = clars_optax.diagnostics(
            params, {**grads, **others}, {**norms, **others}, batch_size=4
        )
        for field in result:
            assert jax.tree.structure(field) == jax.tree.structure(params)
        assert result.variance_factor["w"] == 0.25


def test_a_mask_may_be_a_model_that_can_be_called():
    class Model(eqx.Module):
        kernel: Any

        def __call__(self, x):
            return x @ self.kernel

    model = Model(np.ones((2, 2), np.float32))
    result = clars_optax.diagnostics(
        model, model, Model(np.ones(4)), batch_size=4, trust_ratio_mask=Model(False)
    )
    assert result.trust_ratio.kernel == 1.0


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("mapper", ["pmap", "shard_map"])
def test_devices_equal_one(averaged, mapper):
    params, example_grads = draw(0, 16)
    groups = group(example_grads, 2)
    expected = clars_optax.diagnostics(
        params, means_of(groups), norms_of(groups), batch_size=16, group_size=2
    )
    params, groups = jax.tree.map(jnp.float32, (params, groups))

    def body(groups):
        grads = jax.tree.map(lambda g: g.mean(0), groups)
        if averaged:
            grads = jax.lax.pmean(grads, "devices")
        norms = jax.tree.map(jax.vmap(lambda g: jnp.sqrt(jnp.sum(g**2))), groups)
        return clars_optax.diagnostics(
            params, grads, norms, batch_size=16, group_size=2, axis_name="devices"
        )

    if mapper == "pmap":
        shards = jax.tree.map(lambda g: g.reshape(8, -1, *g.shape[1:]), groups)
        result = jax.tree.map(lambda x: x[5], jax.pmap(body, axis_name="devices")(shards))
    else:
        auto = jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((8,), ("devices",), axis_types=(auto,))
        result = jax.jit(
            jax.shard_map(
                body, mesh=mesh, in_specs=PartitionSpec("devices"), out_specs=PartitionSpec()
            )
        )(groups)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), result, expected)


def test_nothing_but_a_batch_of_one_group_makes_a_nan():
    w = {"w": np.ones((2, 2), np.float32)}
    with jax.debug_nans(True):
        clars_optax.diagnostics(w, w, {"w": np.ones(4, np.float32)}, batch_size=4)


def test_no_parameters():
    with pytest.raises(ValueError, match="`params` is missing"):
        clars_optax.diagnostics(None, np.ones(2), np.ones(4), batch_size=4)


@pytest.mark.parametrize(
    ("norms", "sizes", "message"),
    [
        (np.ones(4), (4, 3), "`batch_size` is 4 and `group_size` is 3: expected is a batch of"),
        (np.ones(4), (4, 8), "`batch_size` is 4 and `group_size` is 8.*examples of all devices"),
        (np.ones(4), (4, 0), "`group_size` is 0"),
        (np.ones(4), (0, 1), "`batch_size` is 0"),
        (np.ones(8), (4, 1), r"`norms` at \['w'\] has 8 norms, each of 1 example\(s\).*no more"),
        (np.ones(4), (8, 4), r"4 norms, each of 4 example\(s\), on each of 1 device"),
        (1.0, (4, 1), r"`norms` at \['w'\] is a scalar.*before you average"),
        (np.ones((4, 2)), (4, 1), r"`norms` at \['w'\] has shape \(4, 2\)"),
        (optax.MaskedNode(), (4, 1), r"`norms` has no norm for \['w'\]"),
    ],
)
def test_errors(norms, sizes, message):
    params = {"w": np.ones((2, 2))}
    batch_size, group_size = sizes
    with pytest.raises(ValueError, match=message):
        clars_optax.diagnostics(
            params, params, {"w": norms}, batch_size=batch_size, group_size=group_size
        )


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (np.ones((2, 2), np.complex64), TypeError, r"`grads` at \['w'\] is complex64\[2, 2\]"),
        (optax.MaskedNode(), TypeError, r"`grads` at \['w'\] is of type MaskedNode"),
        (None, TypeError, r"`grads` at \['w'\] is None"),
        (
            np.ones(4),
            ValueError,
            r"`params` at \['w'\] has shape \(2, 2\), but `grads` has .* \(4,\)",
        ),
    ],
)
def test_gradients_that_do_not_fit(grad, error, message):
    params, norms = {"w": np.ones((2, 2))}, {"w": np.ones(4)}
    with pytest.raises(error, match=message):
        clars_optax.diagnostics(params, {"w": grad}, norms, batch_size=4)


@pytest.mark.parametrize("size", [True, 2.0, "2", None])
@pytest.mark.parametrize("name", ["batch_size", "group_size"])
def test_sizes_that_are_no_integers(name, size):
    with pytest.raises(TypeError, match=f"^`{name}` is {size!r}: expected is an int"):
        of_leaf(1.0, [1.0, 1.0], **{"batch_size": 2, name: size})


def test_the_batch_size_of_one_device_is_refused():
    def body(norms):
        return clars_optax.diagnostics(
            jnp.ones(2), jnp.ones(2), norms, batch_size=2, axis_name="devices"
        )

    with pytest.raises(ValueError, match=r"2 norms.*8 device\(s\).*`batch_size`, 2, which counts"):
        jax.pmap(body, axis_name="devices")(jnp.ones((8, 2)))
