"""What has no per-example gradient, or cannot be followed yet, is refused by name, with the
remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clars_optax
from tests.norms.models import normal

PARAMS = {"w": normal(0, 4, 4), "t": jnp.float32(1.5)}
BATCH = normal(1, 6, 4)


def mean_loss(params, x):
    return jnp.mean(jnp.square(x @ params["w"]))


def temperature_after_the_mean(params, x):
    return mean_loss(params, x) / params["t"]


def temperature_times_a_penalised_mean(params, x):
    return (mean_loss(params, x) + jnp.sum(params["w"] ** 2)) * params["t"]


def square_of_a_penalised_mean(params, x):
    penalised = mean_loss(params, x) + jnp.sum(params["t"] ** 2)
    return penalised * penalised


def temperature_on_the_logits_of_pairs(params, x):
    z = x @ params["w"]
    return jnp.mean(jax.nn.logsumexp(z @ z.T * params["t"], axis=1))


def parameters_as_more_examples(params, x):
    return jnp.mean(jnp.concatenate([x, params["w"]], axis=0) ** 2)


def parameter_on_a_part_of_the_batch(params, x):
    half = x.shape[0] // 2
    return jnp.mean(x[:half] @ params["w"]) + jnp.mean(x[half:])


def gathered_from_the_batch_into_a_parameter(params, x):
    return jnp.sum(params["w"].at[jnp.arange(x.shape[0]) % 4].add(x) ** 2)


def tiled_across_examples(params, x):
    return jnp.mean((jnp.tile(params["w"][0, :2], x.size // 2) * x.T.reshape(-1)) ** 2)


def written_to_a_mutable_array(params, x):
    made = jax.new_ref(jnp.zeros(x.shape))
    made[...] = jnp.tanh(x @ params["w"])
    return jnp.mean(made[...] ** 2)


def added_to_a_mutable_array_in_a_loop(params, x):
    made = jax.new_ref(jnp.zeros(x.shape))

    def body(i, _):
        made[...] += jnp.tanh(x @ params["w"]) * i
        return 0

    jax.lax.fori_loop(0, 3, body, 0)
    return jnp.mean(made[...] ** 2)


def made_mutable(params, x):
    made = jax.new_ref(jnp.tanh(x @ params["w"]))
    return jnp.mean(made[...] ** 2)


def summed_by_segments_as_many_as_examples(params, x):
    sums = jax.ops.segment_sum(jnp.tanh(x), jnp.int32(x[:, 0] > 0), num_segments=x.shape[0])
    return jnp.mean((sums @ params["w"]) ** 2)


def put_into_slots(put, slots_of=lambda x: jnp.ones_like(x)):
    def loss(params, x):
        segments = jnp.int32(x[:, 0] > 0)
        return jnp.mean(jnp.tanh(put(slots_of(x).at[segments], x) @ params["w"])[segments] ** 2)

    return loss


SLOTS = [
    put_into_slots(lambda at, x: at.max(x)),
    put_into_slots(lambda at, x: at.min(x)),
    put_into_slots(lambda at, x: at.subtract(x)),
    put_into_slots(lambda at, x: at.add(x), lambda x: 0 * x),
]


def put_into_slots_in_a_loop(params, x):
    segments = jnp.int32(x[:, 0] > 0)
    slots = jax.lax.fori_loop(0, 2, lambda _, slots: slots.at[segments].add(x), jnp.zeros_like(x))
    return jnp.mean(jnp.tanh(slots @ params["w"])[segments] ** 2)


def of_a_part(part, layer=lambda x, w: jnp.tanh(x @ w)):
    def loss(params, x):
        return jnp.mean((layer(x, params["w"]) - layer(part(x), params["w"]).mean(0)) ** 2)

    return loss


def layer_in_a_loop(x, w):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=2)[0]


def prototypes(params, x):
    """Of what another layer gives, the part; of its own results it would be no matter."""
    h = jnp.tanh(x @ params["w"])
    return jnp.mean((jnp.tanh(h @ params["w"]) @ jnp.tanh(h[:2] @ params["w"]).T) ** 2)


def recurrent_from_a_part(params, x):
    return jnp.mean((x * layer_in_a_loop((x @ params["w"])[0], params["w"])) ** 2)


def scaled_by_an_entry(params, x):
    return jnp.mean((x * (params["t"] * x[jnp.int32(0), 1])) ** 2)


def scaled_by_a_mean_of_half(params, x):
    return jnp.mean((x * (params["t"] * x[: len(x) // 2].mean())) ** 2)


PARTS = [
    of_a_part(lambda x: x[:1]),
    of_a_part(lambda x: x[0][None]),
    of_a_part(lambda x: x[jnp.array([1, 3])]),
    of_a_part(lambda x: x[jax.random.randint(jax.random.key(0), (2,), 0, len(x))] / 2),
    of_a_part(lambda x: jnp.split(x, [2])[0]),
    of_a_part(lambda x: x[:2], jax.checkpoint(lambda x, w: jnp.tanh(x @ w))),
    of_a_part(lambda x: x[:2], layer_in_a_loop),
    prototypes,
    recurrent_from_a_part,
    scaled_by_an_entry,
    scaled_by_a_mean_of_half,
]


def term_that_the_batch_chooses(params, x):
    return mean_loss(params, x) + jnp.where(x.mean() > 0, params["t"], 0.0)


def loss_or_penalty(params, x):
    value, penalty = mean_loss(params, x), params["t"] ** 2
    return jnp.where(value > penalty, value, penalty)


def put_into_slots_as_many_as_examples(params, x):
    slots = jnp.cumsum(x[:, 0] > 0) % x.shape[0]
    experts = jnp.int32(x[:, 1] > 0)
    taken = jnp.zeros((2, *x.shape)).at[experts, slots].set(x)
    return jnp.mean(jnp.tanh(taken @ params["w"]) ** 2)


@jax.custom_vjp
def product_and_penalty(x, w):
    return x @ w, jnp.sum(w**2)


product_and_penalty.defvjp(
    lambda x, w: (product_and_penalty(x, w), (x, w)),
    lambda saved, g: (g[0] @ saved[1].T, saved[0].T @ g[0] + 2 * saved[1] * g[1]),
)


def one_result_for_all(params, x):
    return jnp.mean(product_and_penalty(x, params["w"])[0] ** 2)


def map_over_batches(params, x):
    return jnp.mean(jax.lax.map(lambda row: (row @ params["w"]) ** 2, x, batch_size=2))


def padded_to_the_batch(params, x):
    return jnp.mean((x + jnp.pad(params["w"][:1], ((0, x.shape[0] - 1), (0, 0)))) ** 2)


def concatenated_to_the_batch(params, x):
    return jnp.mean((jnp.concatenate([params["w"][:1]] * x.shape[0]) * x) ** 2)


def in_another_order_at_twice_the_batch_size(params, x):
    c, b = normal(3, 4, 4), jnp.broadcast_to(params["w"][0], (4, 4))
    return jnp.mean(((x @ c) @ b if x.shape[0] <= 6 else x @ (c @ b)) ** 2)


def scan_over_the_examples(params, x):
    def step(total, now):
        return total + jnp.sum(jnp.square(now @ params["w"])), None

    return jax.lax.scan(step, 0.0, x)[0] / x.shape[0]


def scan_over_the_examples_by_index(params, x):
    def step(total, index):
        return total + jnp.sum(jnp.square(x[index] @ params["w"])), None

    return jax.lax.scan(step, 0.0, jnp.arange(x.shape[0]))[0] / x.shape[0]


def map_over_pieces_of_the_batch(params, x):
    return jnp.mean(jax.lax.map(lambda x: x @ params["w"], x, batch_size=2))


def while_loop(params, x):
    return jnp.mean(jax.lax.while_loop(lambda h: h.sum() > 1e6, lambda h: h @ params["w"], x))


def temperature_after_the_mean_of_a_scan(params, x):
    def step(total, now):
        return (total + jnp.mean(jnp.square(now @ params["w"]))) * params["t"], None

    return jax.lax.scan(step, 0.0, jnp.stack([x, x]))[0]


def temperature_after_the_mean_in_a_branch(params, x):
    return jax.lax.cond(True, lambda: mean_loss(params, x) / params["t"], lambda: 0.0)


def logits_of_pairs_checkpointed(params, x):
    return jax.checkpoint(temperature_on_the_logits_of_pairs)(params, x)


def with_backward(function, backward):
    """The function, with a backward that takes its arguments and the cotangent."""
    own = jax.custom_vjp(function)
    own.defvjp(lambda *args: (function(*args), args), backward)
    return own


def own_derivative(function):
    """The function, with its derivative stated as a custom one."""
    return with_backward(function, lambda r, g: jax.vjp(function, *r)[1](g))


@own_derivative
def fused_batch_norm(x, scale):
    return (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-3) * scale


def fused_batch_norm_with_its_scale(params, x):
    return jnp.mean(fused_batch_norm(x, params["w"][0]) ** 3)


@own_derivative
def shifted_by_the_first(x, scale):
    return jnp.cumsum(x - x[0], 0) * scale


def running_sum_over_the_examples(params, x):
    return jnp.mean(shifted_by_the_first(x, params["w"][0]) ** 3)


@own_derivative
def plus_scaled(x, part, scale):
    return x + part * scale


def shifted_by_a_part(params, x):
    return jnp.mean(plus_scaled(x, x[0], params["w"][0]) ** 3)


@own_derivative
def scaled(x, scale):
    return x * scale


def clipped(residuals, g):
    x, scale = residuals
    g = g / jnp.maximum(1.0, jnp.linalg.norm(g))
    return g * scale, jnp.sum(g * x, 0)


scaled_with_clipped_gradients = with_backward(lambda x, scale: x * scale, clipped)


def scaled_with_own_gradient(of_scale):
    """`x * scale`, with a gradient of the scale made from the cotangents and x."""
    return with_backward(lambda x, scale: x * scale, lambda r, g: (g * r[1], of_scale(g, r[0])))


scaled_with_the_sign_of_the_gradient = scaled_with_own_gradient(
    lambda g, x: jnp.sign(jnp.sum(g * x, 0))
)


def gradients_clipped_across_examples(params, x):
    return jnp.mean(scaled_with_clipped_gradients(x, params["w"][0]) ** 2)


def sign_of_a_sum_over_examples(params, x):
    return jnp.mean(scaled_with_the_sign_of_the_gradient(x, params["w"][0]) ** 2)


def custom_backward_that_a_single_example_does_not_reach(params, x):
    if x.shape[0] == 1:
        return jnp.mean(x * params["w"][0])
    return jnp.mean(scaled(x, params["w"][0]) ** 2)


def custom_backward_in_a_loss_of_two_and_more(params, x):
    if x.shape[0] < 2:
        raise ValueError("at least two")
    return jnp.mean(scaled(x, params["w"][0]) ** 2)


with_the_mean_of_the_gradients = scaled_with_own_gradient(lambda g, x: jnp.sum(g * x, 0) / len(g))
with_a_weight_for_small_batches = scaled_with_own_gradient(
    lambda g, x: jnp.sum(g * x, 0) * min(len(g), 4)
)


def gradients_divided_by_the_batch_size(params, x):
    return jnp.mean(with_the_mean_of_the_gradients(x, params["w"][0]) ** 2)


def gradients_times_the_size_of_small_batches(params, x):
    return jnp.mean(with_a_weight_for_small_batches(x, params["w"][0]) ** 2)


clipped_gradient = with_backward(lambda w: w, lambda _, g: (jnp.clip(g, -0.01, 0.01),))


def clips_the_gradient_of_a_parameter(params, x):
    return mean_loss({"w": clipped_gradient(params["w"])}, x)


def clips_the_gradient_of_a_parameter_in_a_scan(params, x):
    _, w = jax.lax.scan(lambda c, row: (c, clipped_gradient(row)), None, params["w"])
    return mean_loss({"w": w}, x)


decayed = with_backward(lambda w: w, lambda r, g: (g + 0.1 * r[0],))


def adds_to_the_gradient_of_a_parameter(params, x):
    return mean_loss({"w": decayed(params["w"])}, x)


with_a_loss_of_its_own = with_backward(lambda h, a: h, lambda r, g: (g, jnp.ones_like(r[1])))
with_a_gradient_of_its_own = with_backward(lambda w: w, lambda r, g: (0.1 * jnp.sign(r[0]),))
looked_up_and_decayed = with_backward(
    lambda w, i: w[i], lambda r, g: ((0.1 * r[0]).at[r[1]].add(g), None)
)
rounded_to_integers = with_backward(
    lambda w: w, lambda r, g: (g.astype(jnp.int32).astype(jnp.float32),)
)
rounded_to_eight_bits = with_backward(
    lambda w: w, lambda r, g: (g.astype(jnp.float8_e4m3fn).astype(jnp.float32),)
)
with_numbers_as_the_batch_size = with_backward(
    lambda x, w: x * w / 6 + 12,
    lambda r, g: (g * r[1] / 6, (r[0] * g).sum(0) / 6 / len(g) * 12),
)


def adds_a_loss_in_a_backward(params, x):
    h = with_a_loss_of_its_own(x * params["w"][0], jnp.sum(params["w"] ** 2))
    return jnp.mean(jnp.sum(h**2, 1))


def states_the_gradient_of_a_parameter(params, x):
    return mean_loss({"w": with_a_gradient_of_its_own(params["w"])}, x)


def decays_what_is_looked_up(params, x):
    places = jnp.arange(x.size).reshape(x.shape)[:, 0] % 2 + jnp.int32(x[:, 0] > 0)
    return jnp.mean(looked_up_and_decayed(params["w"], places) * x)


def rounds_the_gradient_of_a_parameter(params, x):
    return mean_loss({"w": rounded_to_integers(params["w"])}, x)


def rounds_the_gradient_of_a_parameter_to_eight_bits(params, x):
    return mean_loss({"w": rounded_to_eight_bits(params["w"])}, x)


def numbers_as_the_batch_size(params, x):
    return jnp.mean(with_numbers_as_the_batch_size(x, params["w"][0]) ** 2)


def reordered_in_a_branch(params, x):
    n = len(x)
    h = jnp.stack([x, 2 * x], 1).reshape(-1, x.shape[1])
    order = jnp.arange(2 * n).reshape(n, 2).T.reshape(-1)
    h = jax.lax.cond(jnp.sum(x) > 0, lambda h: h[order], lambda h: h, h)
    return jnp.mean(h * params["w"][0])


def own_entries_for_a_part_of_the_batch(params, x):
    return jnp.mean((x.reshape(-1, 3, x.shape[1]) + params["w"][:3]) ** 2)


def own_entries_that_are_repeated(params, x):
    w = jnp.broadcast_to(params["w"][:3], (len(x) // 3, 3, x.shape[1]))
    return jnp.mean((x.reshape(-1, 3, x.shape[1]) + w) ** 2)


def sharded_inside(params, x):
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = jax.shard_map(
        lambda w, x: x @ w,
        mesh=mesh,
        in_specs=(jax.P(), jax.P("devices")),
        out_specs=jax.P("devices"),
    )
    return jnp.mean(layer(params["w"], x) ** 2)


def solve(params, x):
    return jnp.mean(jax.scipy.linalg.solve_triangular(params["w"], x.T, lower=True))


def changes_with_the_batch_size(params, x):
    h = x @ params["w"]
    return jnp.mean(
        h * params["t"] if x.shape[0] > 6 else jnp.sin(h * params["t"] + 1) * params["t"]
    )


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            temperature_after_the_mean,
            ValueError,
            r"args\[0\]\['t'\].*`div` .*reduced over the batch.*before the mean",
        ),
        (square_of_a_penalised_mean, ValueError, r"'t'.*`mul`.*before the mean"),
        (temperature_times_a_penalised_mean, ValueError, r"'t'.*`mul`.*before the mean"),
        (
            temperature_on_the_logits_of_pairs,
            ValueError,
            r"'t'.*`mul`.*two batch axes.*Scale the embeddings",
        ),
        (
            parameters_as_more_examples,
            NotImplementedError,
            r"'w'.*`concatenate`.*one axis is the batch",
        ),
        (parameter_on_a_part_of_the_batch, NotImplementedError, r"'w'.*a part of the batch"),
        (
            gathered_from_the_batch_into_a_parameter,
            NotImplementedError,
            r"'w'.*`scatter-add`.*not supported",
        ),
        (tiled_across_examples, ValueError, r"'w'.*`tile`.*examples are mixed"),
        (padded_to_the_batch, ValueError, r"'w'.*`pad`.*examples are mixed"),
        (concatenated_to_the_batch, ValueError, r"'w'.*traced differently"),
        (in_another_order_at_twice_the_batch_size, ValueError, r"'w'.*traced differently"),
        (scan_over_the_examples, NotImplementedError, r"'w'.*`scan`.*steps are the examples"),
        (
            scan_over_the_examples_by_index,
            NotImplementedError,
            r"'w'.*`scan`.*steps are the examples.*jax.vmap",
        ),
        (map_over_pieces_of_the_batch, NotImplementedError, r"'w'.*`scan`.*jax.vmap"),
        (while_loop, NotImplementedError, r"'w'.*`while`.*not supported"),
        (temperature_after_the_mean_of_a_scan, ValueError, r"'t'.*`mul`.*before the mean"),
        (temperature_after_the_mean_in_a_branch, ValueError, r"'t'.*`div`.*before the mean"),
        (logits_of_pairs_checkpointed, ValueError, r"'t'.*`mul`.*two batch axes"),
        (
            fused_batch_norm_with_its_scale,
            NotImplementedError,
            r"'w'.*`custom_vjp_call.*that example alone.*outside of it",
        ),
        (gradients_clipped_across_examples, NotImplementedError, r"'w'.*`custom_vjp_call.*alone"),
        (sign_of_a_sum_over_examples, NotImplementedError, r"'w'.*`custom_vjp_call.*alone"),
        (running_sum_over_the_examples, NotImplementedError, r"'w'.*`custom_vjp_call.*alone"),
        (
            custom_backward_that_a_single_example_does_not_reach,
            NotImplementedError,
            r"'w'.*`custom_vjp_call.*with 1 example.*another computation then",
        ),
        (
            custom_backward_in_a_loss_of_two_and_more,
            NotImplementedError,
            r"'w'.*`custom_vjp_call.*with 1 example.*at least two",
        ),
        (
            gradients_divided_by_the_batch_size,
            NotImplementedError,
            r"'w'.*`custom_vjp_call.*number which depends on the batch size",
        ),
        (
            gradients_times_the_size_of_small_batches,
            NotImplementedError,
            r"'w'.*`custom_vjp_call.*with 1 example.*another computation then",
        ),
        (
            clips_the_gradient_of_a_parameter_in_a_scan,
            NotImplementedError,
            r"'w'.*`scan.*linear.*after the call",
        ),
        *(
            (loss, NotImplementedError, r"'w'.*`custom_vjp_call.*linear.*after the call")
            for loss in (
                clips_the_gradient_of_a_parameter,
                adds_to_the_gradient_of_a_parameter,
                states_the_gradient_of_a_parameter,
                rounds_the_gradient_of_a_parameter,
                rounds_the_gradient_of_a_parameter_to_eight_bits,
            )
        ),
        (adds_a_loss_in_a_backward, NotImplementedError, r"'w'.*`custom_vjp_call.*alone"),
        (decays_what_is_looked_up, NotImplementedError, r"'w'.*`custom_vjp_call.*alone"),
        (
            numbers_as_the_batch_size,
            NotImplementedError,
            r"'w'.*`custom_vjp_call.*number which depends on the batch size",
        ),
        (reordered_in_a_branch, NotImplementedError, r"'w'.*`mul`.*cannot be followed"),
        (own_entries_for_a_part_of_the_batch, ValueError, r"'w'.*`add`.*examples are mixed"),
        (
            own_entries_that_are_repeated,
            ValueError,
            r"'w'.*`broadcast_in_dim`.*examples are mixed",
        ),
        (
            sharded_inside,
            NotImplementedError,
            r"'w'.*`shard_map`.*inside of jax.shard",
        ),
        (written_to_a_mutable_array, NotImplementedError, r"in `swap` .*to a mutable array"),
        (added_to_a_mutable_array_in_a_loop, NotImplementedError, "in `scan` .*to a mutable array"),
        (made_mutable, NotImplementedError, r"in `(new_)?ref` .*to a mutable array"),
        (
            summed_by_segments_as_many_as_examples,
            NotImplementedError,
            "'w'.*where something is put depends on the batch",
        ),
        (
            put_into_slots_as_many_as_examples,
            NotImplementedError,
            "'w'.*where something is put depends on the batch",
        ),
        *(
            (loss, NotImplementedError, "'w'.*where something is put depends on the batch")
            for loss in (*SLOTS, put_into_slots_in_a_loop)
        ),
        *((loss, ValueError, r"'[wt]'.*fixed part of the batch.*outside of b") for loss in PARTS),
        (shifted_by_a_part, ValueError, "'w'.*`custom_vjp_call.*fixed part of the batch"),
        (term_that_the_batch_chooses, ValueError, "'t'.*`select_n`.*before the mean"),
        (loss_or_penalty, ValueError, "'t'.*`select_n`.*before the mean"),
        (one_result_for_all, NotImplementedError, "'w'.*`custom_vjp_call.*from two functions"),
        (map_over_batches, NotImplementedError, r"'w'.*`scan.*jax\.lax\.map without batch_size"),
        (solve, NotImplementedError, r"'w'.*`triangular_solve`.*not supported"),
        (changes_with_the_batch_size, ValueError, r"'w'.*traced differently at twice"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_refused_by_name(loss, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        clars_optax.value_and_grad_and_norms(loss)(PARAMS, BATCH)


@pytest.mark.parametrize("loss", [temperature_after_the_mean, scan_over_the_examples])
def test_nothing_is_refused_for_parameters_that_do_not_enter(loss):
    """What is refused for a parameter is fine for an argument that is no parameter."""

    def of_weights(w, x, t):
        return loss({"w": w, "t": t}, x @ w)

    step = clars_optax.value_and_grad_and_norms(of_weights)
    if loss is scan_over_the_examples:

        def of_weights_outside(w, x, t):
            return loss({"w": jnp.eye(4), "t": t}, x @ w)

        step = clars_optax.value_and_grad_and_norms(of_weights_outside)
    if loss is temperature_after_the_mean:
        _, grads, _ = step(PARAMS["w"], BATCH, PARAMS["t"])
        expected = jax.grad(of_weights)(PARAMS["w"], BATCH, PARAMS["t"])
        assert jnp.allclose(grads, expected, rtol=1e-5)
    else:
        step(PARAMS["w"], BATCH, PARAMS["t"])


def test_refused_values_may_be_auxiliary():
    def loss(params, x):
        value = mean_loss(params, x)
        return value, value / params["t"]

    (_, aux), _, norms = clars_optax.value_and_grad_and_norms(loss, has_aux=True)(PARAMS, BATCH)
    assert jnp.allclose(aux, mean_loss(PARAMS, BATCH) / 1.5)
    assert jnp.array_equal(norms["t"], jnp.zeros(6))


@pytest.mark.parametrize(("size", "other"), [(None, 12), (6, 12), (3, 3), (1, 2)])
def test_loss_that_closes_over_the_batch(size, other):
    step = clars_optax.value_and_grad_and_norms(
        lambda params, x: jnp.mean((x - BATCH) @ params["w"]), microbatch_size=size
    )
    with pytest.raises(
        ValueError, match=rf"6 examples, but not with {other}, .*closes over.*batch_argnums"
    ):
        step(PARAMS, BATCH)


def test_loss_that_closes_over_two_examples():
    """One of them fits them both, and so do two."""
    step = clars_optax.value_and_grad_and_norms(
        lambda params, x: jnp.mean((x - BATCH[:2]) @ params["w"]), microbatch_size=1
    )
    with pytest.raises(ValueError, match=r"2 examples, but not with 3, .*closes over"):
        step(PARAMS, BATCH[:2])


def test_statistics_may_be_written_to_mutable_arrays():
    def loss(params, x):
        h = x @ params["w"]
        seen = jax.new_ref(jnp.zeros(4))
        seen[...] += jax.lax.stop_gradient(h.mean(0))
        return jnp.mean((h - seen[...]) ** 2)

    def without(params, x):
        h = x @ params["w"]
        return jnp.mean((h - jax.lax.stop_gradient(h.mean(0))) ** 2)

    found, expected = (
        clars_optax.value_and_grad_and_norms(f)(PARAMS, BATCH) for f in (loss, without)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)


def test_entries_are_counted_where_positions_do_not_depend_on_the_batch():
    """As a bag of words is made: the rows are those of the examples, one after another."""

    def loss(params, words):
        rows = jnp.arange(len(words))[:, None]
        bags = jnp.zeros((len(words), 4)).at[rows, words].add(1.0)
        return jnp.mean(jnp.square(bags @ params["w"]))

    words = jnp.array([[0, 1, 1], [3, 2, 0], [2, 2, 2]])
    _, _, norms = clars_optax.value_and_grad_and_norms(loss)(PARAMS, words)
    alone = jax.vmap(lambda one: jax.grad(loss)(PARAMS, one[None])["w"])(words)
    np.testing.assert_allclose(norms["w"], jnp.linalg.norm(alone, axis=(1, 2)), rtol=1e-5)


def test_replicated_parameters_in_shard_map():
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    split, same = jax.P("devices"), jax.P()
    step = jax.shard_map(
        clars_optax.value_and_grad_and_norms(mean_loss),
        mesh=mesh,
        in_specs=(same, split),
        out_specs=(split, same, split),
    )
    with pytest.raises(NotImplementedError, match=r"(?s)'w'.*between devices.*to='varying'"):
        step(PARAMS, BATCH)


@pytest.mark.parametrize("microbatch_size", [1, 3])
def test_parameter_term_in_a_sum_over_micro_batches(microbatch_size):
    step = clars_optax.value_and_grad_and_norms(
        lambda params, x: jnp.sum((x @ params["w"]) ** 2) + jnp.sum(params["w"] ** 2),
        loss_reduction="sum",
        microbatch_size=microbatch_size,
    )
    with pytest.raises(ValueError, match=r"term of parameters alone.*weight_decay"):
        step(PARAMS, BATCH)


@pytest.mark.parametrize("ordered", [False, True])
def test_debug_print_prints_once(capsys, ordered):
    def loss(params, x):
        jax.debug.print("rows: {}", x.shape[0] + 0 * x.sum(), ordered=ordered)
        return mean_loss(params, x)

    jax.block_until_ready(jax.jit(clars_optax.value_and_grad_and_norms(loss))(PARAMS, BATCH))
    jax.effects_barrier()
    assert capsys.readouterr().out.count("rows: 6.0") == 1
