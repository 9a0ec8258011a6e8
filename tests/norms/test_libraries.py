"""Models of Flax Linen, Flax NNX, Haiku and Equinox, as their libraries have them.

The reference is the gradient of every example's own loss (`jax.jacrev` of the vector of losses, so
that dropout draws the same mask), or, with BatchNorm, a copy of the parameters for every example,
mapped over with an axis name through which the copies share the statistics of their batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import clars_optax
from tests.norms.models import normal

NUM_EXAMPLES = 4
TOKENS = jnp.asarray([[1, 2, 3, 1], [4, 4, 0, 2], [0, 3, 3, 3], [5, 1, 0, 4]])
IMAGES = normal(0, NUM_EXAMPLES, 6, 5, 3)


class Case(NamedTuple):
    """`losses(params, batch, axis_name)` returns one loss per example, and auxiliary data.

    With an `axis_name`, `batch` is one example, of many that are mapped over with this name.
    """

    losses: Callable[..., tuple[jax.Array, Any]]
    params: Any
    batch: Any
    couples: bool = False


CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def squared(outputs):
    """A loss of every example's outputs that is no symmetric function of them."""
    flat = outputs.reshape(outputs.shape[0], -1)
    return jnp.sum(jnp.linspace(0.5, 1.5, flat.shape[1]) * flat**2, axis=1)


def moved(params):
    """Scales and biases that are not at their initial values."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: np.asarray(p + 0.2 * rng.normal(size=p.shape), np.float32),
        jax.tree.map(np.asarray, params),
    )


@case
def linen_transformer():
    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(6, 4)
            x = embed(tokens) + self.param("position", nn.initializers.normal(1.0), (4, 4))
            x = nn.Dropout(0.3, deterministic=False)(x)
            mask = nn.make_causal_mask(tokens)
            attention = nn.MultiHeadDotProductAttention(
                num_heads=2, dropout_rate=0.2, deterministic=False
            )
            x = x + attention(nn.LayerNorm()(x), mask=mask)
            h = nn.gelu(nn.DenseGeneral((2, 3))(nn.RMSNorm()(x)))
            x = x + nn.DenseGeneral(4, axis=(-2, -1))(h)
            return embed.attend(x)

    model = Transformer()
    params = jax.jit(model.init)(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, TOKENS
    )["params"]

    def losses(params, tokens, axis_name):
        rngs = {"dropout": jax.random.key(1)}
        logits = model.apply({"params": params}, tokens, rngs=rngs)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)
        return -picked.sum((1, 2)), logits

    return Case(losses, moved(params), TOKENS)


@case
def linen_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.GroupNorm(num_groups=2)(nn.Conv(4, (3, 3), padding="CIRCULAR")(x))
            x = nn.silu(nn.Conv(8, (3, 2), kernel_dilation=(2, 1), feature_group_count=4)(x))
            x = nn.max_pool(x, (2, 2), (2, 1), padding="SAME")
            x = nn.tanh(nn.InstanceNorm()(nn.ConvTranspose(5, (3, 2), (2, 1))(x)))
            x = nn.ConvTranspose(3, (2, 2), (2, 2), padding="VALID", transpose_kernel=True)(x)
            x = nn.WeightNorm(nn.ConvLocal(2, (2, 2), (2, 3), padding="VALID"))(x)
            return nn.PReLU()(x)

    model = Net()
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]

    def losses(params, images, axis_name):
        outputs = model.apply({"params": params}, images)
        return squared(outputs), outputs

    return Case(losses, moved(params), IMAGES)


@case
def linen_batch_norm():
    class Net(nn.Module):
        axis_name: str | None = None

        @nn.compact
        def __call__(self, x):
            def norm(x):
                return nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)

            x = nn.relu(norm(nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)))
            x = norm(nn.Conv(4, (3, 3), feature_group_count=4)(x)) + x
            # The squares of what is normalised have a sum that nothing before it changes.
            return nn.tanh(norm(nn.Dense(3)(nn.tanh(x).mean((1, 2)))))

    variables = jax.jit(Net().init)(jax.random.key(0), IMAGES)

    def losses(params, images, axis_name):
        outputs, updated = Net(axis_name).apply(
            {**variables, "params": params}, images, mutable=["batch_stats"]
        )
        return squared(outputs), (updated["batch_stats"], outputs)

    return Case(losses, moved(variables["params"]), IMAGES, couples=True)


def of_nnx(make, batch, couples=False):
    """The parameters of an NNX module, with the rest of its state as auxiliary data."""
    graph, params, rest = nnx.split(make(None), nnx.Param, ...)

    def losses(params, batch, axis_name):
        graph_here = graph if axis_name is None else nnx.graphdef(make(axis_name))
        model = nnx.merge(graph_here, params, rest, copy=True)
        outputs = model(batch)
        return squared(outputs), (nnx.state(model, nnx.BatchStat), outputs)

    return Case(losses, moved(params), batch, couples)


@case
def nnx_transformer():
    class Transformer(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed = nnx.Embed(6, 4, rngs=rngs)
            self.norms = nnx.List([nnx.LayerNorm(4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)])
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)
            self.up = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
            self.down = nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=rngs)

        def __call__(self, tokens):
            x = self.dropout(self.embed(tokens))
            x = x + self.attention(self.norms[0](x))
            return self.embed.attend(x + self.down(nnx.gelu(self.up(self.norms[1](x)))))

    return of_nnx(lambda axis_name: Transformer(), TOKENS)


@case
def nnx_convolutions_and_batch_norm():
    class Net(nnx.Module):
        def __init__(self, axis_name):
            rngs = nnx.Rngs(0)
            self.one = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
            self.batch_norm = nnx.BatchNorm(4, axis_name=axis_name, rngs=rngs)
            self.two = nnx.ConvTranspose(4, 6, (2, 2), strides=(2, 1), rngs=rngs)
            self.group_norm = nnx.GroupNorm(6, num_groups=3, rngs=rngs)
            self.three = nnx.Conv(6, 6, (2, 2), feature_group_count=6, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.batch_norm(self.one(x)))
            return self.three(nnx.silu(self.group_norm(self.two(x)))).mean((1, 2))

    return of_nnx(Net, IMAGES, couples=True)


def of_haiku(function, batch, couples=False):
    model = hk.transform_with_state(function)
    params, state = jax.jit(model.init, static_argnums=2)(jax.random.key(0), batch, None)

    def losses(params, batch, axis_name):
        outputs, updated = model.apply(params, state, jax.random.key(1), batch, axis_name)
        return squared(outputs), (updated, outputs)

    return Case(losses, moved(params), batch, couples)


@case
def haiku_transformer():
    def forward(tokens, axis_name):
        x = hk.Embed(6, 4)(tokens)
        initialiser = hk.initializers.RandomNormal()
        x = x + hk.get_parameter("position", x.shape[1:], init=initialiser)
        h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = x + hk.MultiHeadAttention(2, 2, model_size=4, w_init=initialiser)(h, h, h)
        h = hk.RMSNorm(-1)(hk.dropout(hk.next_rng_key(), 0.2, x))
        return x + hk.Linear(4)(jax.nn.gelu(hk.Linear(5)(h)))

    return of_haiku(forward, TOKENS)


@case
def haiku_convolutions_and_batch_norm():
    def forward(x, axis_name):
        def norm(x):
            layer = hk.BatchNorm(True, True, 0.9, cross_replica_axis=axis_name)
            return layer(x, is_training=True)

        x = jax.nn.relu(norm(hk.Conv2D(4, 3, stride=2, with_bias=False)(x)))
        x = norm(hk.DepthwiseConv2D(2, 3)(x))
        x = hk.GroupNorm(2)(hk.Conv2DTranspose(6, 2, stride=2)(x))
        return hk.Linear(3)(hk.Flatten()(x))

    return of_haiku(forward, IMAGES, couples=True)


@case
def equinox_transformer():
    class Transformer(eqx.Module):
        """Of one example, as Equinox has it."""

        embed: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP
        dropout: eqx.nn.Dropout

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.embed = eqx.nn.Embedding(6, 4, key=keys[0])
            self.norm = eqx.nn.LayerNorm(4)
            self.attention = eqx.nn.MultiheadAttention(2, 4, use_output_bias=True, key=keys[1])
            self.mlp = eqx.nn.MLP(4, 4, 5, 1, key=keys[2])
            self.dropout = eqx.nn.Dropout(0.2)

        def __call__(self, tokens, key):
            x = self.dropout(jax.vmap(self.embed)(tokens), key=key)
            h = jax.vmap(self.norm)(x)
            return jax.vmap(self.mlp)(x + self.attention(h, h, h))

    params, static = eqx.partition(Transformer(jax.random.key(0)), eqx.is_inexact_array)

    def losses(params, tokens, axis_name):
        model = eqx.combine(params, static)
        outputs = jax.vmap(model)(tokens, jax.random.split(jax.random.key(1), tokens.shape[0]))
        return squared(outputs), outputs

    return Case(losses, moved(params), TOKENS)


@case
def equinox_convolutions_and_batch_norm():
    class Net(eqx.Module):
        one: eqx.nn.Conv2d
        batch_norm: eqx.nn.BatchNorm
        two: eqx.nn.ConvTranspose2d
        group_norm: eqx.nn.GroupNorm
        out: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.one = eqx.nn.Conv2d(3, 6, 3, stride=2, groups=3, key=keys[0])
            self.batch_norm = eqx.nn.BatchNorm(6, "examples", mode="batch")
            self.two = eqx.nn.ConvTranspose2d(6, 4, 2, stride=2, key=keys[1])
            self.group_norm = eqx.nn.GroupNorm(2, 4)
            self.out = eqx.nn.Linear(4, 3, key=keys[2])

        def __call__(self, image, state):
            h, state = self.batch_norm(self.one(image.transpose(2, 0, 1)), state)
            h = self.group_norm(self.two(jnp.tanh(h)))
            return self.out(jax.nn.relu(h).mean((1, 2))), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def losses(params, images, axis_name):
        model = eqx.combine(params, static)
        axes = {"in_axes": (0, None), "out_axes": (0, None)}
        if axis_name is None:
            outputs, updated = jax.vmap(model, axis_name="examples", **axes)(images, state)
        else:
            # Already mapped over, and the axis has its name.
            output, updated = model(images[0], state)
            outputs = output[None]
        return squared(outputs), (updated, outputs)

    return Case(losses, moved(params), IMAGES, couples=True)


def example_grads(case, params):
    """The definition: one gradient for every example."""
    if not case.couples:
        return jax.jacrev(lambda p: case.losses(p, case.batch, None)[0])(params)

    def sum_over_copies(copies):
        def of_one(params, example):
            return case.losses(params, example[None], "examples")[0][0]

        return jnp.sum(jax.vmap(of_one, axis_name="examples")(copies, case.batch))

    copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (NUM_EXAMPLES, *p.shape)), params)
    return jax.grad(sum_over_copies)(copies)


@pytest.mark.parametrize("name", sorted(CASES))
def test_unmodified_models(name):
    case = CASES[name]()

    def loss(params, batch):
        losses, aux = case.losses(params, batch, None)
        return jnp.mean(losses), aux

    @jax.jit
    def everything(params):
        step = clars_optax.value_and_grad_and_norms(loss, has_aux=True)
        plain = jax.value_and_grad(loss, has_aux=True)
        return step(params, case.batch), plain(params, case.batch), example_grads(case, params)

    (out, grads, norms), (plain_out, plain_grads), rows = everything(case.params)
    # Value and auxiliary data.
    for found, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(plain_out), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(norms) == jax.tree.structure(grads) == jax.tree.structure(case.params)
    expected = jax.tree.map(
        lambda g: np.linalg.norm(g.reshape(NUM_EXAMPLES, -1), axis=1),
        jax.tree.map(np.asarray, rows),
    )
    largest = np.max(jax.tree.leaves(expected))
    trees = [
        jax.tree.leaves_with_path(tree) for tree in (norms, expected, grads, plain_grads, rows)
    ]
    for (path, norm), (_, wanted), (_, grad), (_, plain_grad), (_, row) in zip(*trees, strict=True):
        # Rounding is relative to what is added up: the examples' gradients, which may cancel in
        # their mean, and cotangents, which cancel in the bias of attention's keys.
        bound = 1e-5 * np.max(wanted) + 1e-6 * largest
        name = jax.tree_util.keystr(path)
        assert np.max(np.abs(norm - wanted)) <= bound, name
        assert np.max(np.abs(grad - plain_grad)) <= bound, name
        assert np.max(np.abs(row.mean(0) - plain_grad)) <= bound, name
