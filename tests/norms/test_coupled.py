"""Where examples are coupled, the definition itself: a copy of the parameters for every example."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clars_optax
from tests.norms.models import normal

NUM_EXAMPLES = 8


def assert_close(found, wanted, rtol=1e-5, atol=1e-7):
    """Relative to each leaf's largest entry."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.max(jnp.abs(one - other)) <= rtol * jnp.max(jnp.abs(other)) + atol


def assert_grads_close(found, wanted):
    """The gradient of a bias before BatchNorm is a sum that cancels: rounding is relative to its
    addends."""
    assert_close(found, wanted, atol=3e-6)


def norms_from_copies(loss_of_copies, params, *args):
    """||N dL/dW_i||, with a loss that takes parameters with a leading axis of N equal copies."""
    copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (NUM_EXAMPLES, *p.shape)), params)
    grads = jax.tree.map(
        lambda g: NUM_EXAMPLES * g, jax.jit(jax.grad(loss_of_copies))(copies, *args)
    )
    norms = jax.tree.map(lambda g: jnp.sqrt(jnp.sum(g**2, axis=tuple(range(1, g.ndim)))), grads)
    return grads, norms


class Net(nn.Module):
    """Batch and layer norm, strided, grouped, depthwise and 1x1 convolutions."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        def norm(x):
            return nn.BatchNorm(use_running_average=False, momentum=0.9, axis_name=self.axis_name)(
                x
            )

        x = nn.relu(norm(nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)))
        residual = x
        x = nn.relu(norm(nn.Conv(8, (3, 3), feature_group_count=4)(x)))
        x = norm(nn.Conv(8, (1, 1), use_bias=False)(x)) + residual
        x = nn.silu(nn.LayerNorm()(nn.Conv(8, (3, 3), feature_group_count=8)(x)))
        x = x.mean((1, 2))
        return nn.Dense(5)(nn.relu(norm(nn.Dense(7)(x))))


@pytest.fixture(scope="module")
def flax_net():
    images = normal(0, NUM_EXAMPLES, 6, 6, 3)
    labels = jnp.arange(NUM_EXAMPLES) % 5
    variables = jax.jit(Net().init)(jax.random.key(0), images)
    # Scales and biases that are not at their initial values.
    leaves, treedef = jax.tree.flatten(variables["params"])
    leaves = [p + 0.3 * normal(i, *p.shape) for i, p in enumerate(leaves)]
    params = jax.tree.unflatten(treedef, leaves)

    def cross_entropy(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def loss(params, stats, images, labels):
        logits, updated = Net().apply(
            {"params": params, "batch_stats": stats}, images, mutable=["batch_stats"]
        )
        return cross_entropy(logits, labels).mean(), (updated["batch_stats"], logits)

    def loss_of_copies(copies, stats, images, labels):
        def of_one(params, image, label):
            logits, _ = Net(axis_name="batch").apply(
                {"params": params, "batch_stats": stats}, image[None], mutable=["batch_stats"]
            )
            return cross_entropy(logits[0], label)

        return jax.vmap(of_one, axis_name="batch")(copies, images, labels).mean()

    args = (variables["batch_stats"], images, labels)
    return loss, params, args, norms_from_copies(loss_of_copies, params, *args)


def batch_norm_step(loss, **options):
    return jax.jit(
        clars_optax.value_and_grad_and_norms(loss, has_aux=True, batch_argnums=(2, 3), **options)
    )


def test_flax_net_with_batch_norm_matches_copies(flax_net):
    loss, params, args, (example_grads, expected) = flax_net
    (value, (stats, logits)), grads, norms = batch_norm_step(loss)(params, *args)
    (plain_value, (plain_stats, plain_logits)), plain_grads = jax.jit(
        jax.value_and_grad(loss, has_aux=True)
    )(params, *args)
    chex.assert_trees_all_close(value, plain_value, rtol=1e-6)
    chex.assert_trees_all_close((stats, logits), (plain_stats, plain_logits), rtol=1e-5, atol=1e-6)
    assert_grads_close(grads, plain_grads)
    assert_close(norms, expected)
    # The mean of the per-example gradients is the gradient.
    assert_grads_close(jax.tree.map(lambda g: g.mean(0), example_grads), plain_grads)


def test_one_group_of_all_gives_the_norm_of_the_gradient(flax_net):
    loss, params, args, _ = flax_net
    _, grads, norms = batch_norm_step(loss, group_size=NUM_EXAMPLES)(params, *args)
    assert_close(norms, jax.tree.map(lambda g: jnp.linalg.norm(g.ravel())[None], grads))


def test_groups_with_batch_norm(flax_net):
    loss, params, args, (example_grads, _) = flax_net
    _, _, norms = batch_norm_step(loss, group_size=2, num_norm_examples=6)(params, *args)

    def norm(g):
        g = g.reshape(NUM_EXAMPLES // 2, 2, -1).mean(1)
        return jnp.sqrt(jnp.sum(g**2, axis=1))[:3]

    assert_close(norms, jax.tree.map(norm, example_grads))


def test_sum_reduction(flax_net):
    loss, params, args, (_, expected) = flax_net

    def summed(*args):
        value, aux = loss(*args)
        return value * NUM_EXAMPLES, aux

    _, grads, norms = batch_norm_step(summed, loss_reduction="sum")(params, *args)
    assert_close(norms, expected)
    plain = jax.jit(jax.grad(summed, has_aux=True))(params, *args)[0]
    assert_grads_close(grads, plain)


def apply(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


COUPLED = {}


def coupled(function):
    COUPLED[function.__name__] = function
    return function


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@coupled
def simclr():
    def of_embeddings(one, two):
        z = unit(jnp.concatenate([one, two]))
        logits = z @ z.T * 2.0 - 1e9 * jnp.eye(z.shape[0])
        positives = (jnp.arange(z.shape[0]) + z.shape[0] // 2) % z.shape[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, positives).mean()

    def loss(params, x):
        both = apply(params, jnp.concatenate([x, x * 1.1 + 0.1], axis=0))
        return of_embeddings(*jnp.split(both, 2))

    def of_copies(copies, x):
        each = jax.vmap(apply)
        return of_embeddings(each(copies, x), each(copies, x * 1.1 + 0.1))

    return loss, of_copies


@coupled
def clip_with_scaled_embeddings():
    def of_embeddings(one, two):
        logits = unit(one) @ unit(two).T
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.arange(logits.shape[0])
        ).mean()

    def embed(params, x):
        return apply(params, x) * jnp.exp(params["b"][0]), apply(params, x[..., ::-1])

    def loss(params, x):
        one, two = embed(params, x)
        return of_embeddings(unit(one) * params["b"][1], two)

    def of_copies(copies, x):
        one, two = jax.vmap(embed)(copies, x)
        return of_embeddings(unit(one) * copies["b"][:, 1, None], two)

    return loss, of_copies


def ghost(shape):
    """BatchNorm over the second axis of a reshaped batch."""

    def normalise(h, scale):
        mean, var = h.mean(1, keepdims=True), h.var(1, keepdims=True)
        multiplier = jax.lax.rsqrt(var + 1e-3) * scale
        return (h - mean) * multiplier + scale

    def loss(params, x):
        h = x @ params["w"]
        h = normalise(h.reshape(*shape, h.shape[-1]), params["b"]).reshape(h.shape)
        return jnp.mean(jnp.sin(h @ params["w"].T) ** 3)

    def of_copies(copies, x):
        h = jnp.einsum("nd,nde->ne", x, copies["w"])
        scale = copies["b"].reshape(*shape, h.shape[-1])
        h = normalise(h.reshape(*shape, h.shape[-1]), scale).reshape(h.shape)
        return jnp.mean(jnp.sin(jnp.einsum("ne,nde->nd", h, copies["w"])) ** 3)

    return loss, of_copies


COUPLED["ghost_batch_norm_of_fixed_size"] = lambda: ghost((-1, 4))
COUPLED["ghost_batch_norm_of_fixed_number"] = lambda: ghost((4, -1))


@coupled
def shuffled_batch_statistics():
    def of(h):
        return jnp.mean(jnp.square(h - h.mean(0)) * jax.nn.sigmoid(h.std(0))) / h.max()

    def loss(params, x):
        order = jax.random.permutation(jax.random.key(0), x.shape[0])
        return of(apply(params, x)[order])

    def of_copies(copies, x):
        return of(
            jax.vmap(apply)(copies, x)[jax.random.permutation(jax.random.key(0), NUM_EXAMPLES)]
        )

    return loss, of_copies


@coupled
def columns_of_scaled_ghost_means():
    order = jnp.array([2, 0, 1])

    def of(x, scale):
        halves = x.reshape(2, -1, 4)
        return jnp.mean(jnp.tanh(halves[..., :3] + (halves.mean(0) * scale)[..., order]) ** 3)

    def loss(params, x):
        return of(x, params["b"][:4])

    def of_copies(copies, x):
        return of(x, copies["b"][:, :4].reshape(2, -1, 4))

    return loss, of_copies


@coupled
def order_statistics():
    def of(x, scale):
        return jnp.mean(jnp.tanh(x - scale * jnp.median(x, axis=0)) ** 3)

    def loss(params, x):
        return of(x, params["b"][:4])

    def of_copies(copies, x):
        return of(x, copies["b"][:, :4])

    return loss, of_copies


@coupled
def differences_from_a_part_of_the_batch():
    def of(h):
        return jnp.mean((h @ h[:2].T) ** 2) + jnp.mean(h[1] * h)

    def loss(params, x):
        return of(apply(params, x - x[0]))

    def of_copies(copies, x):
        return of(jax.vmap(apply)(copies, x - x[0]))

    return loss, of_copies


@coupled
def associative_scan_over_the_batch():
    def of(h):
        return jnp.mean(jax.lax.associative_scan(jnp.add, h) ** 2)

    def loss(params, x):
        return of(apply(params, x))

    def of_copies(copies, x):
        return of(jax.vmap(apply)(copies, x))

    return loss, of_copies


@pytest.mark.parametrize("options", [{}, {"group_size": 2}, {"num_norm_examples": 6}], ids=str)
@pytest.mark.parametrize("name", sorted(COUPLED))
def test_coupled_losses_match_copies(name, options):
    loss, of_copies = COUPLED[name]()
    params = {"w": normal(0, 4, 5), "b": 1 + 0.3 * normal(1, 5)}
    x = normal(2, NUM_EXAMPLES, 4)
    example_grads, _ = norms_from_copies(of_copies, params, x)
    value, grads, norms = jax.jit(clars_optax.value_and_grad_and_norms(loss, **options))(params, x)
    plain_value, plain_grads = jax.jit(jax.value_and_grad(loss))(params, x)
    chex.assert_trees_all_close(value, plain_value, rtol=1e-6)
    assert_grads_close(grads, plain_grads)
    size = options.get("group_size", 1)
    kept = options.get("num_norm_examples", NUM_EXAMPLES) // size

    def norm(g):
        g = g.reshape(NUM_EXAMPLES // size, size, -1).mean(1)
        return jnp.sqrt(jnp.sum(np.square(g), axis=1))[:kept]

    assert_close(norms, jax.tree.map(norm, example_grads))
