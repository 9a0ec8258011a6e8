"""The library is given arguments that are valid, or broken in one or two ways.

What is valid has the numbers of a plain definition; what is broken is refused in one line that
names the argument or the path; and it makes no difference whether the call is traced. More
examples:

    python -m pytest -n 0 tests/faults/test_library.py --full
"""

import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import clars_optax

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("compiled_fast")]

REFUSALS = (TypeError, ValueError, NotImplementedError)
MASKED = optax.MaskedNode()
KEY = jax.random.key(0)


def examples(share):
    """So much of the number of examples that the profile asks for."""
    count = max(1, round(hypothesis.settings.default.max_examples * share))
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        phases=[phase for phase in hypothesis.Phase if phase != hypothesis.Phase.explain],
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )


def traced(function, *args):
    """The result under `jit`, what is an array being traced and the rest as it is."""
    leaves, treedef = jax.tree.flatten(args)
    is_array = [
        isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and x.dtype.kind not in "UO")
        for x in leaves
    ]

    @jax.jit
    def of_arrays(arrays):
        arrays = iter(arrays)
        pairs = zip(leaves, is_array, strict=True)
        return function(*treedef.unflatten([next(arrays) if a else x for x, a in pairs]))

    return of_arrays([x for x, a in zip(leaves, is_array, strict=True) if a])


def refusal(function, *args):
    """The type of the error, the same whether traced or not, and its message of one line."""
    with pytest.raises(REFUSALS) as plain:
        function(*args)
    with pytest.raises(REFUSALS) as under_jit:
        traced(function, *args)
    assert plain.type is under_jit.type
    for error in (plain, under_jit):
        assert "\n" not in str(error.value), error.value
    return str(plain.value)


def check_refused(names, function, *args):
    """Some of what is broken is named."""
    message = refusal(function, *args)
    assert any(name in message for name in names), (names, message)


def normal(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# ---- value_and_grad_and_norms ----


def dense_loss(params, x, y):
    """Losses of the examples."""
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.sum((hidden * params["scale"] - y) ** 2, 1)


def conv_loss(params, x, y):
    """A convolution over the features, in one dimension."""
    signal = x[:, :, None]
    kernel = params["w"][:, None, :]
    hidden = jax.lax.conv_general_dilated(
        signal, kernel.astype(x.dtype), (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return jnp.sum(((hidden + params["b"]).mean(1) * params["scale"] - y) ** 2, 1)


class Call:
    """A call of `value_and_grad_and_norms`, which faults change."""

    def __init__(self, losses, count, seed, reduction):
        self.losses = losses
        self.params: dict[str, Any] = {
            "w": normal(seed, (3, 2)), "b": normal(seed + 1, 2), "scale": normal(seed + 2, ()),
        }  # fmt: skip
        self.batch: list[Any] = [normal(seed + 3, (count, 3)), normal(seed + 4, (count, 2))]
        self.more: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {"batch_argnums": (1, 2), "loss_reduction": reduction}
        self.returned = lambda value: value

    def loss(self, params, x, y, *more):
        reduce = jnp.sum if self.options["loss_reduction"] == "sum" else jnp.mean
        return self.returned(reduce(self.losses(params, x, y)))

    def step(self, *args):
        return clars_optax.value_and_grad_and_norms(self.loss, **self.options)(*args)

    @property
    def args(self):
        return (self.params, *self.batch, *self.more)


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def calls(draw):
    count = draw(st.sampled_from([1, 2, 4, 6]))
    call = Call(
        draw(st.sampled_from([dense_loss, conv_loss])),
        count,
        draw(st.integers(0, 99)),
        draw(st.sampled_from(["mean", "sum"])),
    )
    options = call.options
    micro = draw(st.sampled_from([None, *divisors(count)]))
    group = draw(st.sampled_from(divisors(micro or count)))
    integer = draw(st.sampled_from([int, np.int32, np.uint8]))
    norms = draw(st.sampled_from([None, *range(0, count + 1, group)]))
    options["group_size"] = integer(group)
    options["microbatch_size"] = None if micro is None else integer(micro)
    options["num_norm_examples"] = None if norms is None else integer(norms)
    options["method"] = draw(st.sampled_from(["auto", "generic"]))
    options["argnums"] = draw(st.sampled_from([0, (0,), [-3]]))
    unused = [None, MASKED, {}, np.ones((0, 2), np.float32), 1.5, jnp.ones(2, jnp.bfloat16)]
    call.params["unused"] = draw(st.sampled_from(unused))
    call.params["b"] = call.params["b"].astype(
        draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]))
    )
    poison = draw(st.sampled_from([None, None, jnp.nan, jnp.inf]))
    if poison is not None:
        call.batch[0] = call.batch[0].at[draw(st.integers(0, count - 1)), 1].set(poison)
    return call


def expected_of(call):
    """By one gradient per example."""
    options, count = call.options, len(call.batch[0])
    is_mean = options["loss_reduction"] == "mean"

    def one(params, x, y):
        return call.losses(params, x[None], y[None])[0]

    examples = jax.vmap(jax.value_and_grad(one), (None, 0, 0))
    losses, grads = jax.jit(examples)(call.params, *call.batch)
    grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
    mean = np.mean if is_mean else np.sum
    counted = options["num_norm_examples"]
    counted = count if counted is None else counted

    def norms(g):
        groups = g.reshape(count // options["group_size"], options["group_size"], -1).mean(1)
        return np.sqrt(np.sum(groups**2, 1))[: counted // options["group_size"]]

    value = mean(np.asarray(losses, np.float64))
    return value, jax.tree.map(lambda g: mean(g, 0), grads), jax.tree.map(norms, grads)


WRONG_SIZES = [True, 2.0, "2", -1, np.float32(2), (2,), [1], math.nan, jnp.int32(1)]
WRONG_POSITIONS = [7, -7, True, 1.0, "w", None, (), ("w",), (0, 0), range(1)]
WRONG_NAMES = ["Mean", "", None, 3, ["mean"], np.array(["mean", "sum"])]
WRONG_PARAMS = [3, True, np.arange(3), jnp.ones(2, jnp.complex64), 1j, "a", object(), KEY]
WRONG_BATCHES = [
    2.0,
    jnp.ones(()),
    jnp.ones(9),
    "ab",
    object(),
    np.array([None]),
    KEY,
    np.longdouble(1),
]
WRONG_LOSSES = [None, "x", {}, jnp.ones(1), 3, jnp.int32(1), 1j, True, KEY, (1.0, 2.0), object]


def break_size(draw, call):
    name = draw(st.sampled_from(["group_size", "microbatch_size", "num_norm_examples"]))
    call.options[name] = draw(
        st.sampled_from([*WRONG_SIZES, *([0] if name != "num_norm_examples" else []), 7, 10**30])
    )
    return [name]


def break_positions(draw, call):
    name = draw(st.sampled_from(["argnums", "batch_argnums"]))
    wrong = [*WRONG_POSITIONS, 1 if name == "argnums" else 0]
    call.options[name] = draw(st.sampled_from(wrong))
    # (0, 0) of both are overlaps too.
    return ["argnums"]


def break_name(draw, call):
    name = draw(st.sampled_from(["loss_reduction", "method"]))
    call.options[name] = draw(st.sampled_from(WRONG_NAMES))
    return [name]


def break_params(draw, call):
    call.params["wrong"] = draw(st.sampled_from(WRONG_PARAMS))
    return ["args[0]['wrong']"]


def break_batch(draw, call):
    call.batch[1] = {"y": call.batch[1], "wrong": draw(st.sampled_from(WRONG_BATCHES))}
    return ["args[2]['wrong']"]


def break_count(draw, call):
    kept = draw(st.sampled_from([0, 1]))
    call.batch = [x[:0] if kept == 0 else x for x in call.batch]
    if kept:
        call.batch[1] = jnp.concatenate([call.batch[1]] * 2)
        return ["args[2] has"]
    return ["batch is empty"]


def break_loss(draw, call):
    wrong = draw(st.sampled_from(WRONG_LOSSES))
    call.returned = lambda value: wrong
    call.options["has_aux"] = draw(st.booleans()) and not isinstance(wrong, tuple)
    return ["loss_fn"]


def break_aux(draw, call):
    call.returned = lambda value: (value, {"wrong": "text"})
    call.options["has_aux"] = True
    return ["aux['wrong']"]


def break_keys(draw, call):
    call.options["microbatch_size"] = call.options["group_size"]
    call.more, call.options["rng_argnums"] = draw(
        st.sampled_from(
            [
                ((KEY,), ()),
                ((jax.random.PRNGKey(0),), ()),
                ((jax.random.split(jax.random.PRNGKey(0), 3),), ()),
                ((jax.random.split(KEY, 3),), 3),
                ((3.0,), 3),
                (("key",), (3,)),
                ((np.arange(4),), -1),
            ]
        )
    )
    call.options["argnums"] = 0
    return ["args[3]"]


# In the order in which they are made.
FAULTS = [
    break_size, break_positions, break_name, break_params, break_count, break_batch, break_loss,
    break_aux, break_keys,
]  # fmt: skip


@examples(0.2)
@hypothesis.given(calls())
def test_valid_calls_have_the_norms_of_single_examples(call):
    value, grads, norms = traced(call.step, *call.args)
    if not isinstance(call.options["argnums"], int):
        (grads,), (norms,) = grads, norms
    expected = expected_of(call)
    assert_close(value, expected[0], jnp.float32)
    for got, of_all in zip((grads, norms), expected[1:], strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(of_all)
        dtypes = jax.tree.map(jnp.result_type, call.params)
        jax.tree.map(assert_close, got, of_all, dtypes)
    assert {leaf.dtype for leaf in jax.tree.leaves(norms)} <= {jnp.dtype(jnp.float32)}


def assert_close(got, expected, dtype):
    # The gradients of low-precision leaves are rounded, and summed in another order.
    tolerance = max(1e-4, 4 * float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(np.float64(got), expected, rtol=tolerance, atol=tolerance)


@examples(2.0)
@hypothesis.given(st.data(), calls())
def test_broken_calls_are_refused(data, call):
    faults = data.draw(st.lists(st.sampled_from(FAULTS), min_size=1, max_size=2, unique=True))
    faults.sort(key=FAULTS.index)
    names = [name for fault in faults for name in fault(data.draw, call)]
    check_refused(names, call.step, *call.args)


def test_sizes_of_small_numpy_integers_do_not_overflow():
    step = clars_optax.value_and_grad_and_norms(
        lambda p, x: jnp.mean(p * x), microbatch_size=np.int8(100), group_size=np.int8(50)
    )
    _, grad, norms = step(2.0, jnp.arange(200.0))
    np.testing.assert_allclose(grad, 99.5)
    np.testing.assert_allclose(norms, [24.5, 74.5, 124.5, 174.5], rtol=1e-6)


def test_a_loss_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="loss_fn must be a function, got float"):
        clars_optax.value_and_grad_and_norms(3.0)


@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_python_numbers_come_out_as_arrays(microbatch_size):
    def loss(params, x):
        return 2.0, {"rate": 3.0, "norm": jnp.mean(x)}

    step = clars_optax.value_and_grad_and_norms(loss, has_aux=True, microbatch_size=microbatch_size)
    (value, aux), grads, norms = step(jnp.ones(2), jnp.arange(4.0))
    assert [value.shape, aux["rate"].shape] == [(), ()]
    assert (value, aux["rate"], aux["norm"]) == (2.0, 3.0, 1.5)
    np.testing.assert_array_equal(grads, np.zeros(2))
    np.testing.assert_array_equal(norms, np.zeros(4))


def test_keys_in_keyword_arguments_are_refused_by_their_name():
    step = clars_optax.value_and_grad_and_norms(lambda p, x, *, rng: jnp.mean(x), microbatch_size=1)
    with pytest.raises(ValueError, match=r"^kwargs\['rng'\] is a random key.* by position"):
        step(jnp.ones(2), jnp.arange(4.0), rng=KEY)


def test_errors_at_twice_the_batch_size_are_told_in_one_line():
    def loss(params, x):
        if x.shape[0] > 4:
            raise ValueError("the first line\nthe second")
        return jnp.mean(x * params)

    with pytest.raises(ValueError, match=r"was: ValueError: the first line$"):
        clars_optax.value_and_grad_and_norms(loss)(1.0, jnp.arange(4.0))


# ---- clars, scale_by_clars, diagnostics ----


class Problem:
    """Parameters, gradients, norms and hyperparameters, which faults change."""

    def __init__(self, draw):
        shapes = st.sampled_from([(2, 3), (3,), (), (0, 2), (2, 1)])
        dtypes = st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16])
        names = draw(st.lists(st.sampled_from(["w", "bias", "v"]), max_size=3, unique=True))
        self.leaves = names
        self.count = draw(st.integers(1, 3))
        self.params: Any = {"block": {}, "hole": draw(st.sampled_from([None, MASKED, ()]))}
        self.grads: Any = {"block": {}, "hole": self.params["hole"]}
        self.norms: Any = {"block": {}, "hole": self.params["hole"]}
        for name in names:
            seed, shape = draw(st.integers(0, 99)), draw(shapes)
            size = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
            dtype = draw(dtypes)
            special = st.sampled_from([1.0] * 6 + [0.0, math.nan, math.inf, -1.0, 1e6])
            factors = draw(st.lists(special, min_size=self.count, max_size=self.count))
            self.params["block"][name] = (normal(seed, shape) * size).astype(dtype)
            self.grads["block"][name] = normal(seed + 1, shape, dtype)
            norm = jnp.abs(normal(seed + 2, (self.count,))) * jnp.float32(factors)
            self.norms["block"][name] = norm if draw(st.booleans()) else jnp.mean(norm)
        self.options: dict[str, Any] = {
            "trust_coefficient": draw(st.sampled_from([0.01, 1, np.float32(0.5), 0.0])),
            "max_trust_ratio": draw(st.sampled_from([0.1, 5.0, math.inf, jnp.float32(2.0)])),
            "eps": draw(st.sampled_from([1e-6, 0, 0.5])),
        }

    def make_vectors(self):
        for name, norms in self.norms["block"].items():
            self.norms["block"][name] = jnp.broadcast_to(norms, (self.count,))

    def ratio(self, name, mean_norm):
        """The table of `scale_by_clars`, in double precision."""
        options = {key: float(value) for key, value in self.options.items()}
        weight = np.sqrt(np.sum(np.float64(self.params["block"][name]) ** 2))
        if not math.isfinite(mean_norm):
            return math.nan
        cap = options["max_trust_ratio"]
        if weight == 0 or mean_norm == 0:
            return min(cap, 1)
        return min(cap, options["trust_coefficient"] * weight / (mean_norm + options["eps"]))

    def mean_norm(self, name):
        norms = np.float64(self.norms["block"][name])
        return math.nan if (norms < 0).any() else norms.mean()


problems = st.composite(Problem)
MASKS = st.sampled_from([True, False, {"block": True, "hole": False}, clars_optax.default_mask])


def is_scaled(problem, name, mask):
    shape = problem.params["block"][name].shape
    return sum(n > 1 for n in shape) > 1 and name != "bias" if callable(mask) else bool(mask)


WRONG_LEAVES = [
    3, True, "a", jnp.ones(1), jnp.ones((7, 3)), jnp.ones((2, 2, 2)), np.ones((2, 2), int),
    jnp.ones((2, 3), jnp.complex64), {"deeper": jnp.ones(2)}, {}, KEY, object(),
]  # fmt: skip


def break_masked(draw, problem, which):
    """A leaf is masked on one side."""
    name = draw(st.sampled_from(problem.leaves))
    tree = getattr(problem, which)
    block = {**tree["block"], name: draw(st.sampled_from([None, MASKED]))}
    setattr(problem, which, {**tree, "block": block})
    return [f"['block']['{name}']"]


def break_masked_params(draw, problem):
    return break_masked(draw, problem, "params")


def break_masked_grads(draw, problem):
    return break_masked(draw, problem, "grads")


def break_tree(draw, problem):
    """One of two trees has a wrong leaf, one too many or one too few."""
    which = draw(st.sampled_from(["params", "grads"]))
    name = draw(st.sampled_from(problem.leaves))
    block = dict(getattr(problem, which)["block"])
    how = draw(st.sampled_from(["wrong", "wrong", "missing", "extra", "root"]))
    if how == "root":
        setattr(problem, which, draw(st.sampled_from([[], [jnp.ones(2)], {"other": 1.0}, 2.0])))
        return ["`params`"]
    if how == "missing":
        del block[name]
    elif how == "extra":
        name = "extra"
        block[name] = jnp.ones(2)
    else:
        block[name] = draw(st.sampled_from(WRONG_LEAVES))
    setattr(problem, which, {**getattr(problem, which), "block": block})
    return [f"['block']['{name}']"]


WRONG_NORMS = [
    None, MASKED, 3, True, "a", jnp.ones((2, 2)), jnp.ones(0), np.ones(2, int), np.array(["a"]),
    jnp.ones(2, jnp.complex64), {"deeper": jnp.ones(2)}, {}, KEY, object(),
]  # fmt: skip


def break_norms(draw, problem):
    hypothesis.assume(problem.leaves)
    name = draw(st.sampled_from(problem.leaves))
    block = {**problem.norms["block"], name: draw(st.sampled_from(WRONG_NORMS))}
    wholes = [{}, {"other": jnp.ones(2)}, [], jnp.ones(2), 1.0, {**problem.norms, "block": None}]
    if draw(st.booleans()):
        problem.norms = {**problem.norms, "block": block}
        return [f"norms` at ['block']['{name}']", "has no norm for"]
    problem.norms = draw(st.sampled_from(wholes))
    return [f"no norm for ['block']['{min(problem.leaves)}']"]


def break_number(draw, problem):
    name = draw(st.sampled_from(["trust_coefficient", "max_trust_ratio", "eps"]))
    wrong = [
        -1,
        -0.5,
        math.nan,
        np.float32(-1),
        jnp.float32(-2),
        "1",
        None,
        (1.0,),
        jnp.ones(2),
        1j,
        True,
    ]
    problem.options[name] = draw(st.sampled_from(wrong))
    return [f"`{name}`"]


def break_mask(draw, problem):
    wrong = [None, "yes", 1, {"other": True}, {"block": True}, [True], {"block": True, "hole": 0.5}]
    wrong = draw(
        st.sampled_from([*wrong, jnp.ones(2, bool), {"block": {"q": True}, "hole": False}])
    )
    problem.options["trust_ratio_mask"] = draw(st.sampled_from([wrong, lambda tree: wrong]))
    return ["`trust_ratio_mask`"]


TREE_FAULTS = [break_tree, break_norms, break_number]


def broken(data, problem, faults):
    chosen = data.draw(st.lists(st.sampled_from(faults), min_size=1, max_size=2, unique=True))
    chosen.sort(key=faults.index)
    return [name for fault in chosen for name in fault(data.draw, problem)]


def scale(problem):
    def update(grads, params, norms):
        tx = clars_optax.scale_by_clars(**problem.options)
        return tx.update(grads, optax.EmptyState(), params, example_grad_norms=norms)[0]

    return update


@examples(0.3)
@hypothesis.given(problems())
def test_valid_updates_are_scaled_by_the_ratio(problem):
    args = problem.grads, problem.params, problem.norms
    updates, under_jit = scale(problem)(*args), traced(scale(problem), *args)
    assert jax.tree.structure(updates) == jax.tree.structure(problem.grads)
    for name, grad in problem.grads["block"].items():
        expected = problem.ratio(name, problem.mean_norm(name)) * np.float64(grad)
        for got in (updates["block"][name], under_jit["block"][name]):
            assert got.dtype == grad.dtype
            assert_rounded(got, expected)


def assert_rounded(got, expected):
    """Equal up to the rounding of its own type, in which a value may also overflow."""
    expected = np.float64(jnp.asarray(expected, got.dtype))
    tolerance = max(2e-5, 4 * float(jnp.finfo(got.dtype).eps))
    np.testing.assert_allclose(np.float64(got), expected, rtol=tolerance, atol=vanishing(got.dtype))


def vanishing(dtype):
    """What two roundings may lose of a number near zero; XLA has no subnormal float32."""
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    return 2 * max(smallest, float(jnp.finfo(jnp.float32).tiny))


@examples(2.0)
@hypothesis.given(st.data(), problems())
def test_broken_updates_are_refused(data, problem):
    hypothesis.assume(problem.leaves)
    names = broken(data, problem, [break_masked_params, *TREE_FAULTS])
    check_refused(names, scale(problem), problem.grads, problem.params, problem.norms)


def step(problem, **options):
    def two_updates(grads, params, norms):
        tx = clars_optax.clars(0.5, **options, **problem.options)
        state = tx.init(params)
        _, state = tx.update(grads, state, params, example_grad_norms=norms)
        return tx.update(grads, state, params, example_grad_norms=norms)[0]

    return two_updates


@examples(0.2)
@hypothesis.given(
    problems(),
    st.sampled_from([0.0, 0.9]),
    st.booleans(),
    st.sampled_from([0.0, 0.1, lambda count: 0.1]),
    MASKS,
)
def test_valid_steps_are_those_of_the_paper(problem, momentum, nesterov, decay, mask):
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
    options |= {"weight_decay_mask": True, "trust_ratio_mask": mask}
    args = problem.grads, problem.params, problem.norms
    function = step(problem, **options)
    results = function(*args), traced(function, *args)
    for name, grad in problem.grads["block"].items():
        param = np.float64(problem.params["block"][name])
        decayed = np.float64(grad) + (0.0 if decay == 0.0 else 0.1) * param
        buffer = decayed * (1 + momentum)
        buffer = decayed + momentum * buffer if nesterov else buffer
        ratio = 1.0
        if is_scaled(problem, name, mask):
            ratio = problem.ratio(name, problem.mean_norm(name))
        for got in results:
            got = got["block"][name]
            assert got.dtype == grad.dtype
            # Each of the steps is rounded, and sums may cancel.
            tolerance = 40 * float(jnp.finfo(got.dtype).eps)
            size = np.float64(abs(0.5 * ratio * (abs(np.float64(grad)) + abs(param)) * 2))
            np.testing.assert_allclose(
                np.float64(got),
                -0.5 * ratio * buffer,
                rtol=tolerance,
                atol=tolerance * size.max(initial=0) + vanishing(got.dtype),
            )


def break_state(draw, problem):
    problem.options["state"] = draw(
        st.sampled_from([None, optax.EmptyState(), (), 3, {"other": jnp.ones(2)}, {}, jnp.ones(2)])
    )
    return ["`state`"]


def break_hyperparameter(draw, problem):
    name = draw(st.sampled_from(["learning_rate", "momentum", "weight_decay"]))
    wrong = ["1", (1.0,), jnp.ones(2), 1j, True, {}, KEY, None]
    problem.options[name] = draw(st.sampled_from(wrong))
    return [f"`{name}`"]


def clars_step(problem, params):
    """One step from the state that the unbroken parameters have, unless that is broken."""
    options = {
        "learning_rate": 0.5,
        "trust_ratio_mask": True,
        "weight_decay": 0.1,
        **problem.options,
    }
    of_state = options.pop("state", params)

    def update(grads, params, norms):
        tx = clars_optax.clars(**options)
        is_tree = isinstance(of_state, dict | jax.Array)
        state = tx.init(of_state) if is_tree else of_state
        return tx.update(grads, state, params, example_grad_norms=norms)[0]

    return update


@examples(2.0)
@hypothesis.given(st.data(), problems())
def test_broken_steps_are_refused(data, problem):
    hypothesis.assume(problem.leaves)
    params = problem.params
    masked = [break_masked_params, break_masked_grads]
    faults = [*masked, *TREE_FAULTS, break_mask, break_state, break_hyperparameter]
    names = broken(data, problem, faults)
    update = clars_step(problem, params)
    check_refused(names, update, problem.grads, problem.params, problem.norms)


@pytest.mark.parametrize("missing", ["params", "example_grad_norms"])
@pytest.mark.parametrize("tx", [clars_optax.clars(0.1), clars_optax.scale_by_clars()])
def test_what_is_missing_is_named(tx, missing):
    params = {"w": jnp.ones((2, 2))}
    given = {"params": params, "example_grad_norms": {"w": jnp.ones(3)}, missing: None}
    with pytest.raises(ValueError, match=f"^`{missing}` is missing: CLARS "):
        tx.update(params, tx.init(params), **given)


@pytest.mark.parametrize("mask", [lambda p: {"w": p["w"].sum() > 0}, {"w": jnp.bool_(True)}])
def test_a_mask_that_depends_on_values_is_refused(mask):
    params = {"w": jnp.ones((2, 2))}

    def state(params):
        return clars_optax.clars(0.1, trust_ratio_mask=mask).init(params)

    for init in (state, jax.jit(state)):
        with pytest.raises(TypeError, match=r"^`trust_ratio_mask` at \['w'\] is bool.* boolean"):
            init(params)


def test_learning_rates_that_are_not_finite_are_not_hidden():
    params = {"w": jnp.ones((2, 2))}
    tx = clars_optax.clars(math.nan)
    updates, _ = tx.update(params, tx.init(params), params, example_grad_norms={"w": jnp.ones(3)})
    assert np.isnan(updates["w"]).all()


def diagnose(problem, **options):
    options = {"batch_size": 2 * problem.count, "group_size": 2, **problem.options, **options}

    def of_trees(grads, params, norms):
        return clars_optax.diagnostics(params, grads, norms, **options)

    return of_trees


@examples(0.3)
@hypothesis.given(problems(), st.integers(0, 2), MASKS)
def test_valid_diagnostics_are_those_of_the_formulas(problem, unseen, mask):
    problem.make_vectors()
    batch = 2 * (problem.count + unseen)
    function = diagnose(problem, batch_size=batch, trust_ratio_mask=mask)
    args = problem.grads, problem.params, problem.norms
    for found in (function(*args), traced(function, *args)):
        for field in found:
            assert jax.tree.structure(field) == jax.tree.structure(problem.params)
        for name, grad in problem.grads["block"].items():
            norms = np.float64(problem.norms["block"][name])
            norms[norms < 0] = math.nan
            with np.errstate(all="ignore"):
                small, big = np.mean(norms**2), np.sum(np.float64(grad) ** 2)
                noise = (small - big) / (1 / 2 - 1 / batch) if batch > 2 else math.nan
                signal = (batch * big - 2 * small) / (batch - 2) if batch > 2 else math.nan
                expected = {
                    "trust_ratio": problem.ratio(name, problem.mean_norm(name))
                    if is_scaled(problem, name, mask)
                    else 1.0,
                    "variance_factor": small / big,
                    "signal_to_noise_ratio": big / np.maximum(small - big, 0),
                    "noise_scale": noise / signal,
                }
            # Differences may cancel.
            sharp = abs(small - big) > 1e-3 * big and abs(signal) > 1e-3 * (small + big)
            for field in expected if sharp else ["trust_ratio", "variance_factor"]:
                got = getattr(found, field)["block"][name]
                assert (got.dtype, got.shape) == (jnp.float32, ())
                np.testing.assert_allclose(got, expected[field], rtol=2e-3)


def break_batch_size(draw, problem):
    name = draw(st.sampled_from(["batch_size", "group_size"]))
    wrong = [True, 2.0, "2", None, 0, -2, 5, np.float32(2), (2,), math.nan]
    problem.options[name] = draw(st.sampled_from(wrong))
    return [f"`{name}`"]


@examples(2.0)
@hypothesis.given(st.data(), problems())
def test_broken_diagnostics_are_refused(data, problem):
    hypothesis.assume(problem.leaves)
    problem.make_vectors()
    names = broken(data, problem, [break_masked_grads, *TREE_FAULTS, break_mask, break_batch_size])
    check_refused(names, diagnose(problem), problem.grads, problem.params, problem.norms)


# ---- from_example_grads ----


def hand_over(example_grads):
    """What a wrapped optimizer is handed."""

    def update_fn(updates, state, params=None, *, example_grad_norms):
        return (updates, example_grad_norms), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    return clars_optax.from_example_grads(tx).update(example_grads, optax.EmptyState())[0]


def example_grads_of(problem):
    return jax.tree.map(
        lambda g: jnp.stack([g * (i + 1) for i in range(problem.count)]), problem.grads
    )


@examples(0.3)
@hypothesis.given(problems(), st.sampled_from([1.0, math.nan, math.inf]))
def test_valid_example_grads_have_their_means_and_norms(problem, poison):
    tree = jax.tree.map(lambda g: g.at[..., :1].multiply(poison), example_grads_of(problem))
    for means, norms in (hand_over(tree), traced(hand_over, tree)):
        assert jax.tree.structure(means) == jax.tree.structure(norms) == jax.tree.structure(tree)
        for name, grads in tree["block"].items():
            exact = np.float64(grads)
            assert means["block"][name].dtype == grads.dtype
            assert_rounded(means["block"][name], exact.mean(0))
            expected = np.sqrt(np.sum(exact.reshape(problem.count, -1) ** 2, 1))
            assert norms["block"][name].dtype == jnp.float32
            np.testing.assert_allclose(norms["block"][name], expected, rtol=1e-5)


@examples(1.0)
@hypothesis.given(st.data(), problems())
def test_broken_example_grads_are_refused(data, problem):
    hypothesis.assume(problem.leaves)
    tree = example_grads_of(problem)
    wrong = [
        3,
        True,
        "a",
        1.0,
        jnp.ones(()),
        jnp.ones((9, 2)),
        jnp.ones((0, 2)),
        np.ones(2, int),
        KEY,
    ]
    wrong += [jnp.ones(2, jnp.complex64), np.array(["a"]), object(), {"deeper": jnp.ones((9, 1))}]
    tree["block"]["wrong"] = data.draw(st.sampled_from(wrong))
    check_refused(["['block']['wrong']"], hand_over, tree)


@pytest.mark.parametrize("tx", [clars_optax.clars, None, 3])
def test_only_optimizers_are_wrapped(tx):
    with pytest.raises(TypeError, match=r"^`tx` is of type .*: expected is an optimizer of Optax"):
        clars_optax.from_example_grads(tx)
