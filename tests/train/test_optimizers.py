"""Each optimizer against its formula in float64, over steps whose gradients and rates change."""

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optimizers import OptimizerName, make_optimizer

NAMES = get_args(OptimizerName)
MOMENTUM, DECAY = 0.9, 0.1
BATCH_SIZE, NUM_RUN_STEPS, NUM_STEPS = 4, 60, 10


def learning_rate(step):
    return 0.5 - 0.02 * step


@pytest.fixture
def params():
    return {
        "dense": {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.array([1.0, -2.0])},
        "norm": {"scale": jnp.array([1.0, 1.0])},
    }


def example_grads(step):
    """Four examples, on the first axis, who agree about the scale most and about the bias least."""
    rng = np.random.default_rng(step)

    def draw(mean, noise):
        mean = np.array(mean)
        return (mean + noise * rng.normal(size=(BATCH_SIZE, *mean.shape))).astype(np.float32)

    return {
        "dense": {
            "kernel": draw([[1.0, 2.0], [-2.0, 0.5]], 1.0) * (step + 1),
            "bias": draw([0.05, 0.02], 1.0),
        },
        "norm": {"scale": draw([-1.0, 2.0], 0.1) / (step + 1)},
    }


def gradients(step):
    return jax.tree.map(lambda g: np.mean(g, axis=0), example_grads(step))


def norms(step):
    return jax.tree.map(
        lambda g: np.mean(np.linalg.norm(g.reshape(BATCH_SIZE, -1), axis=1)), example_grads(step)
    )


def square_norms(step):
    return jax.tree.map(
        lambda g: np.float32(np.sum(np.square(g)) / BATCH_SIZE), example_grads(step)
    )


def make(name, **options):
    defaults = {
        "momentum": MOMENTUM,
        "nesterov": False,
        "weight_decay": DECAY,
        "trust_coefficient": None,
        "max_trust_ratio": None,
        "batch_size": BATCH_SIZE,
        "group_size": 1,
        "num_steps": NUM_RUN_STEPS,
    }
    return make_optimizer(name, learning_rate, **(defaults | options))


def run(optimizer, params, num_steps=NUM_STEPS):
    """The parameters after the steps, and what was diagnosed before each."""
    state, diagnosed = optimizer.transformation.init(params), []
    for step in range(num_steps):
        grads, means = gradients(step), (norms(step), square_norms(step))
        diagnosed.append(optimizer.diagnose(params, grads, *means, state)["trust_ratio"])
        updates, state = optimizer.transformation.update(
            grads,
            state,
            params,
            example_grad_norms=means[0],
            example_grad_square_norms=means[1],
            unknown=None,
        )
        params = jax.tree.map(jnp.add, params, updates)
    return params, diagnosed


def norm(x):
    return np.sqrt(np.sum(np.square(x)))


class ByHand:
    """One layer. `is_weight` says whether it has a layer-wise rate, `decay` how much it decays."""

    def __init__(self, weights, is_weight, decay, nesterov=False):
        self.w, self.is_weight, self.decay = np.asarray(weights, np.float64), is_weight, decay
        self.nesterov = nesterov
        self.buffer = np.zeros_like(self.w)

    def step(self, t, g, examples):
        decayed = g + self.decay * self.w
        self.buffer = MOMENTUM * self.buffer + decayed
        direction = decayed + MOMENTUM * self.buffer if self.nesterov else self.buffer
        ratio = self.ratio(t, g, decayed, examples)
        self.w = self.w - learning_rate(t) * ratio * direction
        return ratio


class Sgd(ByHand):
    def ratio(self, t, g, decayed, examples):
        return 1.0


class Clars(ByHand):
    def ratio(self, t, g, decayed, examples):
        mean_norm = np.mean([norm(example) for example in examples])
        return min(0.1, 0.01 * norm(self.w) / (mean_norm + 1e-6)) if self.is_weight else 1.0


class Lars(ByHand):
    def ratio(self, t, g, decayed, examples):
        return 0.001 * norm(self.w) / (norm(decayed) + 1e-6) if self.is_weight else 1.0


class Tvlars(Lars):
    def ratio(self, t, g, decayed, examples):
        ratio = super().ratio(t, g, decayed, examples)
        factor = 1 / (0.1 + np.exp(10 / NUM_RUN_STEPS * (t + 1)))
        return factor * ratio if self.is_weight else 1.0


class OptaxLars(ByHand):
    def step(self, t, g, examples):
        decayed = g + self.decay * self.w
        ratio = 0.001 * norm(self.w) / norm(decayed) if self.is_weight else 1.0
        scaled = learning_rate(t) * ratio * decayed
        self.buffer = MOMENTUM * self.buffer + scaled
        self.w = self.w - (scaled + MOMENTUM * self.buffer if self.nesterov else self.buffer)
        return ratio


class Lamb(ByHand):
    square = 0.0

    def step(self, t, g, examples):
        self.buffer = MOMENTUM * self.buffer + (1 - MOMENTUM) * g
        self.square = 0.999 * self.square + 0.001 * g**2
        m, v = self.buffer / (1 - MOMENTUM ** (t + 1)), self.square / (1 - 0.999 ** (t + 1))
        update = m / (np.sqrt(v) + 1e-6) + self.decay * self.w
        ratio = norm(self.w) / norm(update) if self.is_weight else 1.0
        self.w = self.w - learning_rate(t) * ratio * update
        return ratio


class Lena(ByHand):
    """As the authors write it: the rate of one worker times r, progress in batches of a worker."""

    top = bottom = progress = 0.0

    def ratio(self, t, g, decayed, examples):
        workers = len(examples)
        beta, warmup = workers / 1000, 0.05 * NUM_RUN_STEPS * workers
        mean_square = np.mean([norm(example) ** 2 for example in examples])
        self.top = beta * mean_square + (1 - beta) * self.top
        self.bottom = beta * norm(g) ** 2 + (1 - beta) * self.bottom
        r = min((self.top + 1e-6) / (self.bottom + 1e-6), workers)
        rate_of_one_worker = learning_rate(t) / workers
        rate = rate_of_one_worker * r * min(1, self.progress / warmup)
        self.progress += r
        return rate / learning_rate(t)


BY_HAND = {
    "clars": Clars,
    "lars": Lars,
    "optax-lars": OptaxLars,
    "lamb": Lamb,
    "sgd": Sgd,
    "lena": Lena,
    "tvlars": Tvlars,
}
WITH_NESTEROV = [name for name in NAMES if name != "lamb"]


def run_by_hand(rule, params, decay_of_all=False, nesterov=False):
    is_weight = {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    layers = jax.tree.map(
        lambda w, is_weight: rule(w, is_weight, DECAY * (is_weight or decay_of_all), nesterov),
        params,
        is_weight,
    )
    ratios = [
        jax.tree.map(
            lambda layer, examples, t=t: layer.step(
                t, np.mean(examples, axis=0, dtype=np.float64), examples.astype(np.float64)
            ),
            layers,
            example_grads(t),
        )
        for t in range(NUM_STEPS)
    ]
    return jax.tree.map(lambda layer: layer.w, layers), ratios


def assert_same(actual, expected, name=None):
    # 1 - 0.999^t, which Optax's Adam divides by, has four digits left in float32.
    rtol = 2e-4 if name == "lamb" else 1e-5
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-6), actual, expected
    )


@pytest.mark.parametrize("name", NAMES)
def test_trajectory_by_hand(name, params):
    expected, _ = run_by_hand(BY_HAND[name], params)

    actual, _ = run(make(name), params)

    assert_same(actual, expected, name)


@pytest.mark.parametrize("name", NAMES)
def test_diagnosed_ratio_is_the_one_of_the_update(name, params):
    _, expected = run_by_hand(BY_HAND[name], params)

    _, ratios = run(make(name), params)

    assert_same(ratios, expected, name)
    if name != "lena":
        assert all(ratio["dense"]["bias"] == 1 for ratio in ratios)
        assert all(ratio["norm"]["scale"] == 1 for ratio in ratios)


@pytest.mark.parametrize("name", WITH_NESTEROV)
def test_nesterov_by_hand(name, params):
    expected, _ = run_by_hand(BY_HAND[name], params, nesterov=True)

    actual, _ = run(make(name, nesterov=True), params)

    assert_same(actual, expected, name)


@pytest.mark.parametrize("name", NAMES)
def test_everything_may_decay(name, params):
    expected, expected_ratios = run_by_hand(BY_HAND[name], params, decay_of_all=True)

    actual, ratios = run(make(name, weight_decay_mask="all"), params)

    assert_same(actual, expected, name)
    assert_same(ratios, expected_ratios, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_compiles_once(name, params):
    optimizer, traces = make(name), []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state, grads, norms, square_norms):
        traces.append(None)
        diagnosed = optimizer.diagnose(params, grads, norms, square_norms, state)
        updates, state = optimizer.transformation.update(
            grads,
            state,
            params,
            example_grad_norms=norms,
            example_grad_square_norms=square_norms,
        )
        return optax.apply_updates(params, updates), state, diagnosed

    expected, _ = run(optimizer, params)
    state = optimizer.transformation.init(params)
    types = [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
    for t in range(NUM_STEPS):
        params, state, _ = step(params, state, gradients(t), norms(t), square_norms(t))

    assert len(traces) == 1
    assert [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)] == types
    assert_same(params, expected)


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_leaves_keep_their_type(name, params):
    def low(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)

    optimizer = make(name).transformation
    expected, _ = run(make(name), params, num_steps=2)
    params, state = low(params), optimizer.init(low(params))
    structure = jax.tree.structure(state)
    types = jax.tree.map(lambda leaf: leaf.dtype, state)

    for t in range(2):
        updates, state = optimizer.update(
            low(gradients(t)),
            state,
            params,
            example_grad_norms=norms(t),
            example_grad_square_norms=square_norms(t),
        )
        params = optax.apply_updates(params, updates)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
        assert jax.tree.structure(state) == structure
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == types

    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a.astype(np.float32), e, rtol=0.05, atol=0.05),
        params,
        expected,
    )


@pytest.mark.parametrize("name", NAMES)
def test_only_those_that_need_norms_read_them(name, params):
    optimizer = make(name)
    state = optimizer.transformation.init(params)
    without = {"example_grad_norms": None, "example_grad_square_norms": None}

    if optimizer.needs_norms:
        with pytest.raises(ValueError, match="value_and_grad_and_norms"):
            optimizer.transformation.update(gradients(0), state, params, **without)
    else:
        optimizer.transformation.update(gradients(0), state, params, **without)
        optimizer.diagnose(params, gradients(0), None, None, state)
    assert optimizer.needs_norms == (name in ("clars", "lena"))


def test_variance_factor_of_clars(params):
    optimizer = make("clars")
    state = optimizer.transformation.init(params)

    diagnosed = optimizer.diagnose(params, gradients(0), norms(0), square_norms(0), state)

    expected = jax.tree.map(lambda g, s: s / np.sum(g**2), gradients(0), square_norms(0))
    assert_same(diagnosed["variance_factor"], expected)


def test_lars_has_no_cap(params):
    grads = jax.tree.map(lambda leaf: -DECAY * leaf + 1e-5, params)

    ratio = make("lars").diagnose(params, grads, None, None, None)["trust_ratio"]["dense"]["kernel"]

    np.testing.assert_allclose(ratio, 0.001 * 5 / 2e-5, rtol=0.1)


@pytest.mark.parametrize(("name", "eps"), [("lars", 1e-6), ("optax-lars", 0.0)])
def test_lars_of_tiny_gradients(name, eps):
    optimizer = make(name, weight_decay=0.0, momentum=0.0)
    params, grads = {"kernel": 2 * jnp.ones((2, 2))}, {"kernel": jnp.full((2, 2), 5e-7)}
    state = optimizer.transformation.init(params)

    (ratio,) = optimizer.diagnose(params, grads, None, None, state)["trust_ratio"].values()
    updates, _ = optimizer.transformation.update(grads, state, params)

    np.testing.assert_allclose(ratio, 0.001 * 4 / (1e-6 + eps), rtol=1e-5)
    np.testing.assert_allclose(updates["kernel"], -0.5 * ratio * 5e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["clars", "lars", "optax-lars", "tvlars"])
def test_trust_coefficient(name, params):
    usual = {"clars": 0.01}.get(name, 0.001)

    (twice,) = run(make(name, trust_coefficient=2 * usual), params, num_steps=1)[1]
    (once,) = run(make(name), params, num_steps=1)[1]

    np.testing.assert_allclose(twice["dense"]["kernel"], 2 * once["dense"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize(("name", "factor"), [("clars", 1), ("lars", 1), ("tvlars", 0.78)])
def test_max_trust_ratio(name, factor, params):
    """The cap of tvlars comes before its factor, 1 / (0.1 + exp(10 / 60)) at the first step."""
    (ratio,) = run(make(name, max_trust_ratio=1e-5), params, num_steps=1)[1]

    np.testing.assert_allclose(ratio["dense"]["kernel"], factor * 1e-5, rtol=0.01)


@pytest.mark.parametrize("num_run_steps", [10, 1000])
def test_factor_of_tvlars_falls_over_the_run(num_run_steps, params):
    optimizer = make("tvlars", num_steps=num_run_steps, max_trust_ratio=1e-5)
    update, diagnose = map(jax.jit, (optimizer.transformation.update, optimizer.diagnose))
    state = optimizer.transformation.init(params)
    grads, factors = gradients(0), []
    for _ in range(num_run_steps):
        diagnosed = diagnose(params, grads, None, None, state)
        factors.append(diagnosed["trust_ratio"]["dense"]["kernel"] / 1e-5)
        _, state = update(grads, state, params)

    # By hand: 1 / (0.1 + e), and 1 / (0.1 + exp(0.01)).
    np.testing.assert_allclose(factors[0], {10: 0.35483, 1000: 0.90083}[num_run_steps], rtol=1e-4)
    np.testing.assert_allclose(factors[-1], np.exp(-10), rtol=0.01)
    assert np.all(np.diff(factors) < 0)


@pytest.fixture
def lena():
    """Ratios of one layer whose groups have gradients mean + noise and mean - noise in turn."""

    def ratios(noise, mean, num_steps, **options):
        optimizer = make("lena", **options)
        params = {"kernel": jnp.zeros((1, 2))}
        state = optimizer.transformation.init(params)
        found = []
        for _ in range(num_steps):
            grads = {"kernel": jnp.array([[mean, 0.0]])}
            means = ({"kernel": None}, {"kernel": jnp.array(mean**2 + noise**2)})
            found.append(optimizer.diagnose(params, grads, *means, state)["trust_ratio"]["kernel"])
            _, state = optimizer.transformation.update(
                grads, state, params, example_grad_square_norms=means[1]
            )
        return np.array(found)

    return ratios


def test_lena_clips_the_gain_at_the_number_of_groups(lena):
    """Pure noise: the full rate, which is linear scaling's, after 5 % of 60 steps."""
    ratios = lena(noise=1.0, mean=0.0, num_steps=6)

    np.testing.assert_allclose(ratios, [0, 1 / 3, 2 / 3, 1, 1, 1], rtol=1e-6)


def test_lena_warms_up_for_longer_where_the_groups_agree(lena):
    """Gain 2 of at most 8: a quarter of the rate, and of the way through the warm-up."""
    ratios = lena(noise=100.0, mean=100.0, num_steps=16, batch_size=16, group_size=2)

    expected = 0.25 * np.minimum(1, 0.25 * np.arange(16) / 3)
    np.testing.assert_allclose(ratios, expected, rtol=1e-6)


def test_lena_without_noise_has_the_rate_of_one_group(lena):
    ratios = lena(noise=0.0, mean=1.0, num_steps=14)

    np.testing.assert_allclose(ratios[-1], 1 / 4, rtol=1e-6)


def test_lena_averages_gains_over_time(params):
    """Constant gradients tell no average from the newest value; a jump does."""
    optimizer = make("lena", num_steps=20)
    params = {"kernel": jnp.zeros((1, 2))}
    state = optimizer.transformation.init(params)
    for mean, square in [(1.0, 1.0), (1.0, 1.0), (1.0, 3.0)]:
        grads, square_norms = {"kernel": jnp.array([[mean, 0.0]])}, {"kernel": jnp.array(square)}
        ratio = optimizer.diagnose(params, grads, None, square_norms, state)["trust_ratio"]
        _, state = optimizer.transformation.update(
            grads, state, params, example_grad_square_norms=square_norms
        )

    beta = 4 / 1000
    old = beta * (1 - beta) ** 2 + beta * (1 - beta)
    gain = (old + 3 * beta + 1e-6) / (old + beta + 1e-6)
    np.testing.assert_allclose(ratio["kernel"], gain / 4 * (2 / 4) / 1, rtol=1e-5)


def test_lena_with_many_groups_takes_the_newest_value():
    """Of 4,096 groups, far more than the 1,000 of the moving average."""
    optimizer = make("lena", batch_size=4096)
    params = {"kernel": jnp.zeros((1, 2))}
    state = optimizer.transformation.init(params)
    grads = {"kernel": jnp.array([[1.0, 0.0]])}
    for square in [100.0, 100.0, 10.0]:
        square_norms = {"kernel": jnp.array(square)}
        ratio = optimizer.diagnose(params, grads, None, square_norms, state)["trust_ratio"]
        _, state = optimizer.transformation.update(
            grads, state, params, example_grad_square_norms=square_norms
        )

    np.testing.assert_allclose(ratio["kernel"], 10 / 4096 * (200 / 4096) / 3, rtol=1e-5)


def test_unknown_name():
    names = "'clars', 'lars', 'optax-lars', 'lamb', 'sgd', 'lena' or 'tvlars'"
    with pytest.raises(ValueError, match=f"^--optimizer is 'adam', but must be {names}"):
        make("adam")


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        (
            "sgd",
            "trust_coefficient",
            0.1,
            "--trust-coefficient is 0.1, but the optimizer sgd has no such thing: say "
            "--trust-coefficient None, or choose 'clars', 'lars', 'optax-lars' or 'tvlars'.",
        ),
        (
            "optax-lars",
            "max_trust_ratio",
            2.0,
            "--max-trust-ratio is 2.0, but the optimizer optax-lars has no such thing: say "
            "--max-trust-ratio None, or choose 'clars', 'lars' or 'tvlars'.",
        ),
        (
            "lamb",
            "nesterov",
            True,
            "--nesterov is True, but the optimizer lamb has no such thing: say --no-nesterov, or "
            "choose 'clars', 'lars', 'optax-lars', 'sgd', 'lena' or 'tvlars'.",
        ),
    ],
)
def test_options_without_a_place(name, option, value, message):
    with pytest.raises(ValueError, match=r"^--") as error:
        make(name, **{option: value})

    assert str(error.value) == message


@pytest.mark.parametrize("name", ["lamb", "lena", "sgd"])
@pytest.mark.parametrize("option", ["trust_coefficient", "max_trust_ratio"])
def test_optimizers_without_a_trust_ratio_of_their_own_take_no_option_for_it(name, option):
    with pytest.raises(ValueError, match="has no such thing"):
        make(name, **{option: math.inf})
