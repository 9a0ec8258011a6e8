"""Parameters that meet the batch inside nested programs: `checkpoint`, `cond`, `scan` ..."""

import functools

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

import clars_optax
from tests.norms.models import NUM_EXAMPLES, Model, normal, squared
from tests.norms.test_uncoupled import norms_of_groups

MODELS = {}


def model(function):
    MODELS[function.__name__] = function
    return function


WIDTHS = {"w": normal(0, 4, 4), "b": normal(1, 4), "v": normal(3, 4, 2), "s": normal(4, 4)}
X = normal(2, NUM_EXAMPLES, 4)
SEQUENCES = normal(5, NUM_EXAMPLES, 3, 4)
STACKED = {"w": normal(0, 3, 4, 4), "b": normal(1, 3, 4), "v": normal(3, 4, 2)}


def block(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


@model
def checkpointed():
    def loss(p, x):
        h = jax.checkpoint(block)(p, x)
        h = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)(p, h)
        return squared(h * p["s"])

    return Model(loss, WIDTHS, X)


@model
def checkpointed_loss_with_a_term_of_parameters():
    @jax.checkpoint
    def loss(p, x):
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
        return jax.checkpoint(lambda x: squared(block(p, x)) + 0.1 * penalty)(x) * 2 + penalty

    return Model(loss, WIDTHS, X)


@model
def checkpointed_by_name():
    def named(p, x):
        h = checkpoint_name(x @ checkpoint_name(p["w"], "w"), "h")
        return jnp.sin(h + p["b"])

    def loss(p, x):
        policy = jax.checkpoint_policies.save_only_these_names("h")
        return squared(jax.checkpoint(named, policy=policy, prevent_cse=False)(p, x))

    return Model(loss, WIDTHS, X)


@model
def branches():
    def loss(p, x):
        h = jax.lax.cond(x.shape[0] * p["s"][0] < 1e3, lambda: x @ p["w"], lambda: x * p["b"])
        h = jax.lax.switch(1, [lambda h: h, lambda h: h * p["s"] + p["b"], jnp.sin], h)
        scale = jax.lax.cond(True, lambda p, q: q, lambda p, q: p, p["b"], p["s"])
        return squared(h * scale)

    return Model(loss, WIDTHS, X)


@model
def branch_that_adds_a_penalty():
    def loss(p, x):
        value = squared(x @ p["w"])
        return jax.lax.cond(
            p["b"][0] < 100, lambda: value + jnp.sum(p["w"] ** 2) * 0.1, lambda: value
        ) + jax.lax.cond(p["b"][0] < 100, lambda: jnp.sum(p["b"] ** 2), lambda: 0.0)

    return Model(loss, WIDTHS, X)


@model
def scan_over_layers():
    def loss(p, x):
        def step(h, layer):
            return block(layer, h) + h, h.mean(1)

        h, means = jax.lax.scan(step, x, {"w": p["w"], "b": p["b"]}, unroll=2)
        return squared(jnp.concatenate([h @ p["v"], means.T], 1))

    return Model(loss, STACKED, X)


@model
def reverse_scan_over_checkpointed_layers():
    def loss(p, x):
        layers = {"w": p["w"], "b": p["b"]}
        h, _ = jax.lax.scan(
            lambda h, layer: (jax.checkpoint(block)(layer, h), None), x, layers, reverse=True
        )
        return squared(h @ p["v"])

    return Model(loss, STACKED, X)


@model
def stacked_layers_used_elsewhere():
    def loss(p, x):
        h, _ = jax.lax.scan(
            lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None), x, (p["w"], p["b"] * 2)
        )
        return squared(h @ p["w"][0]) + jnp.sum(p["b"] ** 2)

    return Model(loss, STACKED, X)


@model
def scan_over_time():
    def loss(p, x):
        def step(h, now):
            h = jnp.tanh(now @ p["w"] + h * p["s"] + p["b"])
            return h, h @ p["v"]

        h, outputs = jax.lax.scan(step, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))
        return squared(outputs.swapaxes(0, 1)) + squared(h)

    return Model(loss, WIDTHS, SEQUENCES)


@model
def scan_with_carries_of_parameters():
    def loss(p, x):
        def step(carry, _):
            power, h, penalty, _ = carry
            power, h = power @ p["w"], jnp.tanh(h @ power + p["b"])
            return (power, h, penalty + jnp.sum(power**2), p["s"]), power[0] * p["s"]

        init = (jnp.eye(4), x, 0.0, jnp.zeros(4))
        (power, h, penalty, other), rows = jax.lax.scan(step, init, None, length=3)
        return squared(h @ power * other * rows[1]) + 0.01 * penalty

    return Model(loss, WIDTHS, X)


@model
def loss_added_up_in_a_scan():
    def loss(p, x):
        def step(total, now):
            penalty = 0.1 * jnp.sum(p["b"] ** 2)
            return total + squared(now @ p["w"]) + penalty, None

        return jax.lax.scan(step, 0.0, x.swapaxes(0, 1))[0]

    return Model(loss, WIDTHS, SEQUENCES)


@model
def for_loop():
    def loss(p, x):
        return squared(jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"] + p["b"]), x))

    return Model(loss, WIDTHS, X)


@model
def loops_in_branches_in_loops():
    def loss(p, x):
        def outer(h, layer):
            def inner(h, index):
                h = jax.lax.cond(index > 1, lambda: block(layer, h), lambda: h * p["v"][:, 0])
                return h, None

            return jax.lax.scan(jax.checkpoint(inner), h, jnp.arange(3))[0], None

        return squared(jax.lax.scan(outer, x, {"w": p["w"], "b": p["b"]})[0])

    return Model(loss, STACKED, X)


@model
def mapped_over_the_batch():
    def loss(p, x):
        return jnp.mean(jax.lax.map(lambda x: jnp.sum(block(p, x) ** 3), x))

    return Model(loss, WIDTHS, SEQUENCES)


@model
def barrier():
    def loss(p, x):
        w, x, b = jax.lax.optimization_barrier((p["w"], x, p["b"]))
        return squared(jnp.tanh(x @ w) + b)

    return Model(loss, WIDTHS, X)


@model
def stacks():
    def loss(p, x):
        h = jnp.stack([x @ p["w"], jnp.broadcast_to(p["b"], x.shape)], 1)
        return squared(jnp.stack([h[:, 0], h[:, 1] * p["s"]], 2))

    return Model(loss, WIDTHS, X)


@jax.custom_vjp
def twice_the_gradient(w, x, shift):
    """A linear layer whose backward is not that of its forward."""
    return jnp.tanh(x @ w) + shift


def _forward(w, x, shift):
    return twice_the_gradient(w, x, shift), (w, x)


def _backward(residuals, g):
    w, x = residuals
    return 2 * jnp.einsum("...d,...e->de", x, g), g @ jnp.sin(w).T, g.sum(range(g.ndim - 1))


twice_the_gradient.defvjp(_forward, _backward)


@model
def custom_vjp():
    def loss(p, x):
        h = twice_the_gradient(p["w"], x, p["b"])
        return squared(twice_the_gradient(p["w"], h * p["s"], p["s"]) @ p["v"])

    return Model(loss, WIDTHS, SEQUENCES)


@model
def custom_vjp_in_checkpointed_scan():
    def loss(p, x):
        @jax.checkpoint
        def step(h, layer):
            return twice_the_gradient(layer[0], h, layer[1]), None

        return squared(jax.lax.scan(step, x, (p["w"], p["b"]))[0] @ p["v"])

    return Model(loss, STACKED, X)


@jax.custom_vjp
def normalised(x, scale):
    return (x - x.mean(-1, keepdims=True)) * scale


normalised.defvjp(
    lambda x, scale: (normalised(x, scale), (x, scale)),
    lambda r, g: jax.vjp(lambda x, s: (x - x.mean(-1, keepdims=True)) * s, *r)[1](g),
)


@model
def custom_vjp_with_batch_on_another_axis():
    def loss(p, x):
        h = jax.vmap(normalised, in_axes=(0, None))(x.swapaxes(0, 1), p["s"])
        return squared(normalised(h, p["b"]).swapaxes(0, 1))

    return Model(loss, WIDTHS, SEQUENCES)


@jax.custom_vjp
def standardised(x, scale):
    """With the variance as NumPy has it, in whose program there is a NaN."""
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-3) * scale


standardised.defvjp(lambda *args: jax.vjp(standardised.fun, *args), lambda pull, g: pull(g))


@jax.custom_vjp
def fused_cross_entropy(x, w, labels):
    """Of which only the logits' gradient is ever whole."""
    logits = x @ w
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - picked


def _of_fused_cross_entropy(residuals, g):
    x, w, labels = residuals
    grads = (jax.nn.softmax(x @ w) - jax.nn.one_hot(labels, w.shape[1])) * g[:, None]
    return grads @ w.T, x.T @ grads, None


fused_cross_entropy.defvjp(
    lambda *args: (fused_cross_entropy(*args), args), _of_fused_cross_entropy
)


@model
def custom_vjp_of_a_norm_and_a_loss():
    def loss(p, x):
        h = standardised(x @ p["w"], p["s"])
        return jnp.mean(fused_cross_entropy(h, p["v"], jnp.argmax(x, axis=1) % 3))

    return Model(loss, WIDTHS, X)


@jax.custom_vjp
def quantised(w, size):
    """As in training for quantised weights; its backward looks at them, but not at gradients."""
    return jnp.clip(jnp.round(w / size), -3, 3) * size


def _of_quantised(residuals, g):
    w, size = residuals
    steps = w / size
    is_inside = jnp.abs(steps) <= 3
    errors = jnp.where(is_inside, jnp.round(steps) - steps, jnp.clip(steps, -3, 3))
    return jnp.where(is_inside, g, 0), jnp.sum(g * errors)


quantised.defvjp(lambda w, size: (quantised(w, size), (w, size)), _of_quantised)


@model
def custom_vjp_of_weights():
    def loss(p, x):
        return squared(jnp.tanh(x @ quantised(p["w"], jnp.abs(p["s"][0]))) @ p["v"])

    return Model(loss, WIDTHS, X)


@jax.custom_vjp
def equilibrium(w, x):
    """Where a layer maps to itself; its backward has a loop, with a gradient that is not used."""
    return jax.lax.fori_loop(0, 20, lambda _, z: _layer(w, x, z), jnp.zeros_like(x))


def _layer(w, x, z):
    return jnp.tanh(z @ w + x)


def _of_equilibrium(residuals, g):
    pull = jax.vjp(_layer, *residuals)[1]
    w, x, z = residuals
    u = jax.lax.fori_loop(0, 20, lambda _, u: g + jax.vjp(_layer, w, x, z)[1](u)[2], g)
    return pull(u)[:2]


def _to_equilibrium(w, x):
    z = equilibrium(w, x)
    return z, (w, x, z)


equilibrium.defvjp(_to_equilibrium, _of_equilibrium)


@model
def custom_vjp_with_a_loop():
    def loss(p, x):
        return squared(equilibrium(0.1 * p["w"], x * p["s"]) @ p["v"])

    return Model(loss, WIDTHS, X)


OPTIONS = [
    {},
    {"group_size": NUM_EXAMPLES},
    {"num_norm_examples": 4, "group_size": 2},
    {"microbatch_size": 3},
]


@functools.cache
def expected(name):
    loss, params, batch = MODELS[name]()
    grads = jax.jit(jax.vmap(lambda p, x: jax.grad(loss)(p, x[None]), in_axes=(None, 0)))(
        params, batch
    )
    return grads, jax.jit(jax.value_and_grad(loss))(params, batch)


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) or "plain"
)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_matches_vmap_of_grad(name, options):
    loss, params, batch = MODELS[name]()
    grads, plain = expected(name)
    value, grad, norms = jax.jit(clars_optax.value_and_grad_and_norms(loss, **options))(
        params, batch
    )
    chex.assert_trees_all_close((value, grad), plain, rtol=1e-5, atol=1e-5)
    group_size = options.get("group_size", 1)
    kept = options.get("num_norm_examples", NUM_EXAMPLES) // group_size
    wanted = jax.tree.map(lambda n: n[:kept], norms_of_groups(grads, group_size))
    chex.assert_trees_all_equal_shapes_and_dtypes(norms, wanted)
    for one, other in zip(jax.tree.leaves(norms), jax.tree.leaves(wanted), strict=True):
        assert np.max(np.abs(one - other)) <= 1e-5 * np.max(other) + 1e-7


def test_policies_of_checkpoint_are_kept():
    """What a policy saves is not computed again."""

    def products(policy):
        step = clars_optax.value_and_grad_and_norms(
            lambda p, x: squared(jax.checkpoint(block, policy=policy)(p, x))
        )
        return str(jax.make_jaxpr(step)(WIDTHS, X)).count("dot_general[")

    assert products(jax.checkpoint_policies.dots_saveable) == products(None) - 1


def nested_in(wrapper, apply):
    """A function of parameters and activations inside of a nested program, once or repeatedly."""

    def wrapped(p, h):
        match wrapper:
            case "checkpoint":
                return jax.checkpoint(apply)(p, h)
            case "closed_over_by_checkpoint":
                return jax.checkpoint(lambda h: apply(p, h))(h)
            case "cond":
                return jax.lax.cond(p["b"][0] < 100, apply, lambda _, h: h, p, h)
            case "constants_of_a_scan":
                return jax.lax.scan(lambda h, _: (apply(p, h), None), h, None, length=2)[0]
            case "slices_of_a_scan":
                stacked = jax.tree.map(lambda a: jnp.stack([a, a * 0.5]), p)
                return jax.lax.scan(lambda h, p: (apply(p, h), None), h, stacked)[0]
            case "outputs_of_a_scan":
                return jax.lax.scan(lambda c, _: (c, apply(p, h)), 0, None, length=2)[1].sum(0)
            case "parameters_of_a_scan":
                return jax.lax.scan(
                    lambda c, _: ((jax.tree.map(jnp.tanh, c[0]), apply(*c)), None),
                    (p, h),
                    None,
                    length=2,
                )[0][1]
            case "barrier":
                return apply(*jax.lax.optimization_barrier((p, h)))
            case "jit":
                return jax.jit(apply)(p, h)

    return wrapped


own_block = jax.custom_vjp(block)
own_block.defvjp(lambda p, h: (block(p, h), (p, h)), lambda r, g: jax.vjp(block, *r)[1](g))

WRAPPERS = """
    barrier checkpoint closed_over_by_checkpoint cond constants_of_a_scan jit
    outputs_of_a_scan parameters_of_a_scan slices_of_a_scan
""".split()


# Not to explain: that traces Python, which makes JAX's tracing many times slower.
@hypothesis.settings(
    max_examples=8, deadline=None, phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink]
)
@hypothesis.given(
    nests=st.lists(st.lists(st.sampled_from(WRAPPERS), max_size=3), min_size=1, max_size=2),
    innermost=st.sampled_from([block, own_block]),
    shared=st.booleans(),
    with_penalty=st.booleans(),
    options=st.sampled_from(OPTIONS[:3]),
    method=st.sampled_from(["auto", "generic"]),
)
def test_random_nests(nests, innermost, shared, with_penalty, options, method):
    def loss(p, x):
        for layer, nest in zip(p, nests, strict=True):
            apply = innermost
            for wrapper in nest:
                apply = nested_in(wrapper, apply)
            x = apply(p[0] if shared else layer, x)
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)) if with_penalty else 0.0
        return squared(x) + 0.1 * penalty

    params = [{"w": normal(10 * i, 4, 4), "b": normal(10 * i + 1, 4)} for i in range(len(nests))]
    grads = jax.jit(jax.vmap(lambda p, x: jax.grad(loss)(p, x[None]), in_axes=(None, 0)))(params, X)
    step = clars_optax.value_and_grad_and_norms(loss, method=method, **options)
    value, grad, norms = jax.jit(step)(params, X)
    plain = jax.jit(jax.value_and_grad(loss))(params, X)
    chex.assert_trees_all_close((value, grad), plain, rtol=1e-4, atol=1e-5)
    wanted = norms_of_groups(grads, options.get("group_size", 1))
    wanted = jax.tree.map(lambda n, like: n[: len(like)], wanted, norms)
    chex.assert_trees_all_close(norms, wanted, rtol=1e-4, atol=1e-5)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        h = nn.MultiHeadDotProductAttention(2)(h)
        return x + nn.Dense(4, dtype=jnp.float32)(nn.gelu(nn.Dense(8)(h))), None


class Stack(nn.Module):
    """Scanned and rematerialised layers, then a recurrent network, as Flax writes them."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layers()(x, None)
        return nn.RNN(nn.GRUCell(5))(x)


def test_flax_scan_remat_and_rnn():
    params = jax.jit(Stack().init)(jax.random.key(0), SEQUENCES)["params"]
    leaves, treedef = jax.tree.flatten(params)
    params = jax.tree.unflatten(
        treedef, [p + 0.2 * normal(i, *p.shape) for i, p in enumerate(leaves)]
    )

    def loss(p, x):
        return squared(Stack().apply({"params": p}, x))

    grads = jax.jit(jax.vmap(lambda p, x: jax.grad(loss)(p, x[None]), in_axes=(None, 0)))(
        params, SEQUENCES
    )
    found = jax.jit(clars_optax.value_and_grad_and_norms(loss))(params, SEQUENCES)
    plain = jax.jit(jax.value_and_grad(loss))(params, SEQUENCES)
    expected = (*plain, norms_of_groups(grads, 1))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


COUPLED = {}


def coupled(function):
    """Makes a loss of parameters, which all examples share, or of which each has a copy."""
    COUPLED[function.__name__] = function
    return function


def each(function, is_copies):
    """Applied to every example, with its copy of the parameters or with those of all."""
    return jax.vmap(function, in_axes=(0 if is_copies else None, 0))


def batch_norm(h):
    return (h - h.mean(0)) * jax.lax.rsqrt(h.var(0) + 1e-3)


def normalised_block(p, h, is_copies):
    h = each(lambda p, h: h @ p["w"], is_copies)(p, h)
    return jnp.tanh(each(lambda p, h: h * p["b"] + p["b"][0], is_copies)(p, batch_norm(h)))


@coupled
def batch_norm_in_checkpoint(is_copies):
    def loss(p, x):
        h = jax.checkpoint(lambda p, x: normalised_block(p, x, is_copies))(p, x)
        return jnp.mean(normalised_block(p, h, is_copies) ** 3)

    return loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}


@coupled
def batch_norm_in_a_scan_over_layers(is_copies):
    def loss(p, x):
        layers = jax.tree.map(lambda a: a.swapaxes(0, 1), p) if is_copies else p
        step = jax.checkpoint(lambda h, p: (normalised_block(p, h, is_copies), None))
        return jnp.mean(jax.lax.scan(step, x, layers)[0] ** 3)

    return loss, {"w": normal(0, 3, 4, 4), "b": normal(1, 3, 4)}


@coupled
def ghost_batch_norm_in_a_scan_over_time(is_copies):
    def loss(p, x):
        def step(h, scale):
            h = each(lambda p, h: h @ p["w"], is_copies)(p, h).reshape(-1, 3, 4)
            # One scale for each ghost batch, made of a parameter and the statistics.
            share = each(lambda p, _: p["b"], True)(p, x) if is_copies else p["b"]
            share = share.reshape(-1, 3, 4) if is_copies else share
            multiplier = jax.lax.rsqrt(h.var(1, keepdims=True) + 1e-3) * share * scale
            h = (h - h.mean(1, keepdims=True)) * multiplier
            return jnp.tanh(h.reshape(x.shape)), jnp.sum(h**3)

        h, sums = jax.lax.scan(step, x, jnp.arange(1.0, 3.0))
        return jnp.mean(h**3) + jnp.sum(sums) / 100

    return loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}


@coupled
def running_statistics_in_a_carry(is_copies):
    """The statistics meet parameters before they meet the batch again."""

    def loss(p, x):
        def step(mean, now):
            h = each(lambda p, h: jnp.tanh(h @ p["w"]), is_copies)(p, now)
            mean = 0.5 * mean + 0.5 * h.mean(0)
            return mean, jnp.mean(each(lambda p, h: (h - mean * p["b"]) ** 3, is_copies)(p, h))

        return jax.lax.scan(step, jnp.zeros(4), jnp.stack([x, 2 * x, x**2]))[1].mean()

    return loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}


@coupled
def statistics_scaled_in_a_branch(is_copies):
    def loss(p, x):
        h = each(lambda p, h: h @ p["w"], is_copies)(p, x)
        mean = h.mean(0)
        if is_copies:
            return jnp.mean((h - mean * p["b"]) ** 3)
        scaled = jax.lax.cond(mean[0] < 1e3, lambda: mean * p["b"], lambda: mean)
        return jnp.mean((h - scaled) ** 3)

    return loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}


@coupled
def examples_in_another_order(is_copies):
    def loss(p, x):
        x = jnp.roll(x[::-1], 2, 0) - x[0]
        h = each(lambda p, h: jnp.tanh(h @ p["w"]), is_copies)(p, x)
        h = jnp.roll(h - h[-1], -1, 0)
        return jnp.mean(each(lambda p, h: h * p["b"], is_copies)(p, h[::-1]) ** 3)

    return loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}


@pytest.mark.parametrize("options", [{}, {"group_size": 2, "num_norm_examples": 4}], ids=str)
@pytest.mark.parametrize("name", sorted(COUPLED))
def test_coupled_examples_match_copies(name, options):
    loss, params = COUPLED[name](is_copies=False)
    of_copies, _ = COUPLED[name](is_copies=True)
    copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (NUM_EXAMPLES, *p.shape)), params)
    grads = jax.jit(jax.grad(of_copies))(copies, X)
    grads = jax.tree.map(lambda g: NUM_EXAMPLES * g, grads)
    value, grad, norms = jax.jit(clars_optax.value_and_grad_and_norms(loss, **options))(params, X)
    plain = jax.jit(jax.value_and_grad(loss))(params, X)
    chex.assert_trees_all_close((value, grad), plain, rtol=1e-5, atol=1e-5)
    wanted = norms_of_groups(grads, options.get("group_size", 1))
    wanted = jax.tree.map(lambda n, like: n[: len(like)], wanted, norms)
    for one, other in zip(jax.tree.leaves(norms), jax.tree.leaves(wanted), strict=True):
        assert np.max(np.abs(one - other)) <= 1e-4 * np.max(other)


def attention_block(p, x):
    scores = (x @ p["q"]) @ x.swapaxes(1, 2)
    h = x + jax.nn.softmax(scores / 4) @ x @ p["out"]
    return h + jax.nn.gelu(h @ p["up"]) @ p["down"]


@pytest.mark.parametrize("method", ["auto", "generic"])
def test_scan_and_checkpoint_keep_memory_low(method):
    """A stack of layers is still a loop, of which only the inputs of the layers are kept."""
    depth, width, hidden = 8, 16, 64
    shapes = {
        "q": (width, width),
        "out": (width, width),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    params = {
        name: 0.1 * normal(i, depth, *shape) for i, (name, shape) in enumerate(shapes.items())
    }
    x = normal(9, 16, 32, width)

    def unrolled(p, x):
        for i in range(depth):
            x = attention_block(jax.tree.map(lambda a, i=i: a[i], p), x)
        return squared(x)

    def scanned(p, x):
        step = jax.checkpoint(lambda x, p: (attention_block(p, x), None))
        return squared(jax.lax.scan(step, x, p)[0])

    def compiled(loss):
        step = clars_optax.value_and_grad_and_norms(loss, method=method)
        return jax.jit(step).lower(params, x).compile()

    one, other = compiled(scanned), compiled(unrolled)
    chex.assert_trees_all_close(one(params, x), other(params, x), rtol=1e-4, atol=1e-5)
    sizes = [step.memory_analysis().temp_size_in_bytes for step in (one, other)]
    assert sizes[0] < sizes[1] / 3
