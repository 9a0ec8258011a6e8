"""What low precision, tiny and huge losses, and sums that cancel do to the norms.

The reference is the same loss in float64, one gradient per example.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clars_optax
from tests.norms.models import normal

NUM_EXAMPLES = 6


def dense_on_sequences(p, h):
    h = jnp.tanh(h @ p["w"] + p["b"])
    return h @ p["v"] * p["s"]


def convolutions(p, h):
    layout = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(h, p["k"], (1, 1), "SAME", dimension_numbers=layout)
    h = jnp.tanh(h * p["s"] + p["b"])
    return jax.lax.conv_general_dilated(
        h, p["depthwise"], (2, 2), "SAME", dimension_numbers=layout, feature_group_count=24
    )


def tokens(p, h):
    h = jnp.tanh(p["table"][h] + p["position"])
    return h @ p["table"].T


MODELS = {
    "dense_on_sequences": (
        dense_on_sequences,
        {
            "w": normal(0, 16, 24) / 4,
            "b": normal(1, 24) / 4,
            "v": normal(2, 24, 12) / 5,
            "s": 1 + normal(3, 12) / 4,
        },
        normal(4, NUM_EXAMPLES, 3, 16),
    ),
    "convolutions": (
        convolutions,
        {
            "k": normal(0, 3, 3, 4, 24) / 6,
            "s": 1 + normal(1, 24) / 4,
            "b": normal(2, 24) / 4,
            "depthwise": normal(3, 3, 3, 1, 24) / 3,
        },
        normal(4, NUM_EXAMPLES, 4, 3, 4),
    ),
    "tokens": (
        tokens,
        {"table": normal(0, 7, 12), "position": normal(1, 4, 12)},
        jnp.arange(NUM_EXAMPLES * 4).reshape(NUM_EXAMPLES, 4) ** 2 % 7,
    ),
}


def losses_of(model, dtype, params, batch):
    """One loss per example: its network in the one precision, the loss itself in the other."""
    if jnp.issubdtype(batch.dtype, jnp.floating):
        batch = batch.astype(dtype)
    h = model(jax.tree.map(lambda p: p.astype(dtype), params), batch)
    h = h.reshape(h.shape[0], -1).astype(jnp.promote_types(dtype, jnp.float32))
    return jnp.sum(jnp.linspace(0.5, 1.5, h.shape[1], dtype=h.dtype) * h**2, axis=1)


def exact_norms(losses, params, batch):
    """In float64; `losses` takes the precision that it computes in."""
    with jax.enable_x64(True):

        def of_example(x):
            return jax.grad(lambda p: losses(jnp.float64, p, x[None])[0])(exact)

        exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        grads = jax.jit(jax.vmap(of_example))(np.asarray(batch))
        return jax.tree.map(
            lambda g: np.linalg.norm(np.asarray(g).reshape(g.shape[0], -1), axis=1), grads
        )


def norms_of(losses, params, batch, **options):
    step = clars_optax.value_and_grad_and_norms(
        lambda p, x: jnp.mean(losses(p, x)), batch_argnums=1, **options
    )
    return jax.tree.map(np.asarray, jax.jit(step)(params, batch)[2])


def largest_error(found, wanted):
    """Relative to each leaf's largest norm."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert {n.dtype for n in jax.tree.leaves(found)} == {np.dtype("float32")}
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(np.max(np.abs(one - other)) / np.max(other) for one, other in pairs)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_close_to_float64(name, dtype, bound):
    """One rounding to bfloat16 is an error of up to 2^-9, 0.2 %; there are a few in a row."""
    model, params, batch = MODELS[name]
    losses = functools.partial(losses_of, model)
    found = norms_of(functools.partial(losses, dtype), params, batch)
    assert largest_error(found, exact_norms(losses, params, batch)) < bound


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_norms_scale_as_the_loss(name, scale):
    model, params, batch = MODELS[name]
    losses = functools.partial(losses_of, model, jnp.float32)
    found = norms_of(lambda p, x: scale * losses(p, x), params, batch)
    expected = jax.tree.map(lambda n: scale * n, norms_of(losses, params, batch))
    assert largest_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "group_size"), [*((name, 1) for name in sorted(MODELS)), ("dense_on_sequences", 2)]
)
def test_one_over_a_large_batch_does_not_underflow(name, group_size):
    """Norms of 1e-17 have squares that float32 holds; of 1e-17 / N it would hold none."""
    model, params, batch = MODELS[name]
    batch = jnp.tile(batch, (32, *[1] * (batch.ndim - 1)))
    losses = functools.partial(losses_of, model, jnp.float32)
    scaled = norms_of(lambda p, x: 1e-17 * losses(p, x), params, batch, group_size=group_size)
    expected = norms_of(losses, params, batch[:NUM_EXAMPLES], group_size=group_size)
    first = jax.tree.map(lambda n: 1e17 * n[: NUM_EXAMPLES // group_size], scaled)
    assert largest_error(first, expected) < 1e-5


# Activations x with a large mean and a small spread, and cotangents g that sum to zero over the
# positions, as they do before a normalisation. In the gradient x' g the mean cancels, which costs
# no more than the mean over the spread, 100, times the rounding error. In the Gram matrices x x'
# and g g' it is squared, and so is what cancelling costs, unless the activations are centred first:
# on these very cases norms from plain Gram matrices are off by 1.5e-4 to 5e-4 in float32, and by
# more than 100 % if x x' is rounded to bfloat16, where x' g with its sums in float32 has errors
# below 1e-6.


def nearly_constant(*shape):
    """Mean 1, standard deviation 0.01, exact in bfloat16."""
    return (1 + 0.01 * normal(0, *shape)).astype(jnp.bfloat16).astype(jnp.float32)


def zero_sum_weights(positions, features):
    """Small integers, every one of which has its opposite at another position."""
    rng = np.random.default_rng(1)
    half = rng.integers(-3, 4, size=(positions // 2, features))
    return rng.permuted(np.concatenate([half, -half]), axis=0)


def linear_dense(dtype, p, x):
    h = x.astype(dtype) @ p["w"].astype(dtype)
    weights = zero_sum_weights(*h.shape[1:])
    return jnp.sum(h.astype(jnp.promote_types(dtype, jnp.float32)) * weights, axis=(1, 2))


def linear_convolution(dtype, p, x):
    h = jax.lax.conv_general_dilated(
        x.astype(dtype),
        p["w"].astype(dtype),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    h = h.reshape(h.shape[0], -1, h.shape[-1]).astype(jnp.promote_types(dtype, jnp.float32))
    return jnp.sum(h * zero_sum_weights(*h.shape[1:]), axis=(1, 2))


CANCELLING = {
    # So few positions that Gram matrices are the smaller product.
    "dense 16x16": (linear_dense, (16, 16), (4, 16)),
    "dense 64x64": (linear_dense, (64, 64), (4, 64)),
    "convolution": (linear_convolution, (3, 3, 16, 32), (4, 4, 16)),
}


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("name", sorted(CANCELLING))
def test_means_that_cancel(name, dtype, bound):
    losses, kernel, example = CANCELLING[name]
    params = {"w": normal(2, *kernel)}
    batch = nearly_constant(NUM_EXAMPLES, *example)
    found = norms_of(functools.partial(losses, dtype), params, batch)
    assert largest_error(found, exact_norms(losses, params, batch)) < bound


@pytest.mark.parametrize("name", sorted(CANCELLING))
def test_plain_gram_matrices_would_fail(name):
    """The test above can fail: norms from plain Gram matrices do, in both precisions."""
    losses, kernel, example = CANCELLING[name]
    x = np.asarray(nearly_constant(NUM_EXAMPLES, *example))
    if len(kernel) > 2:
        x = np.lib.stride_tricks.sliding_window_view(x, kernel[:2], (1, 2))
        x = np.moveaxis(x, 3, -1).reshape(NUM_EXAMPLES, 4, -1)
    g = jnp.asarray(zero_sum_weights(4, kernel[-1]), jnp.float32)
    expected = np.linalg.norm(
        np.einsum("ntd,tp->ndp", x.astype(np.float64), np.asarray(g, np.float64)), axis=(1, 2)
    )
    check = exact_norms(losses, {"w": np.ones(kernel)}, nearly_constant(NUM_EXAMPLES, *example))
    np.testing.assert_allclose(expected, check["w"], rtol=1e-9)
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 5e-3)):
        gram = jnp.einsum("ntd,nsd->nts", *[jnp.asarray(x, dtype)] * 2).astype(jnp.float32)
        squares = jnp.sum(gram * (g @ g.T), axis=(1, 2))
        found = np.sqrt(np.maximum(np.asarray(squares, np.float64), 0))
        assert largest_error({"w": found.astype(np.float32)}, {"w": expected}) > bound


def test_means_that_a_normalisation_takes_out():
    """As it comes in a network: the spread of the activations over time is divided out."""

    def losses(dtype, p, x):
        h = x.astype(dtype) @ p["w"]
        centred = h - h.mean(1, keepdims=True)
        h = centred / jnp.sqrt(jnp.square(centred).mean(1, keepdims=True) + 1e-6)
        return jnp.sum(jnp.tanh(h @ p["v"]) ** 2, axis=(1, 2))

    params = {"w": normal(1, 64, 64) / 8, "v": normal(2, 64, 5) / 8}
    batch = nearly_constant(NUM_EXAMPLES, 6, 64)
    found = norms_of(functools.partial(losses, jnp.float32), params, batch)
    assert largest_error(found, exact_norms(losses, params, batch)) < 1e-4
