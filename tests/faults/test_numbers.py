"""Losses, gradients, norms and weights that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clars_optax
from tests.train.commands import lines_of, numbers_of, run_here
from train import body
from train.body import Accumulation, Sums, TrainBody
from train.checkpoint import Checkpoints
from train.configs import CONFIGS
from train.data import DATASETS
from train.errors import RunError
from train.finite import describe
from train.optimizers import make_optimizer
from train.run_folder import CHECKPOINTS
from train.setup import prepare
from train.state import TrainState

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("small_network")]

PARAMS = {"head": {"bias": jnp.full(3, 0.5), "kernel": jnp.full((2, 3), 0.25)}}
SCHEDULE = optax.linear_schedule(2.0, 1.0, 10)
TREES = {
    "loss": 0.0,
    **dict.fromkeys(("gradient", "norms", "weights"), PARAMS),
    "running averages": {"mean": 0.0},
}


def finish(sums):
    """The end of a step on two devices, of a state that has taken three steps."""
    optimizer = make_optimizer(
        "clars",
        SCHEDULE,
        **{"momentum": 0.9, "nesterov": False, "weight_decay": 0.1, "weight_decay_mask": "all"},
        **{"trust_coefficient": None, "max_trust_ratio": None},
        **{"batch_size": 8, "group_size": 1, "num_steps": 10},
    )
    state = TrainState.create(
        apply_fn=None,
        params=PARAMS,
        tx=optimizer.transformation,
        batch_stats={"mean": jnp.ones(2)},
        ema={"params": PARAMS, "batch_stats": {"mean": jnp.ones(2)}},
        ema_decay=0.9,
    )
    state = state.replace(step=3, opt_state=optax.tree.set(state.opt_state, count=3))
    accumulation = Accumulation(pieces=1, piece_size=4, num_norm_examples=4)
    train_body = TrainBody(DATASETS["digits"], optimizer, SCHEDULE, accumulation, "devices")
    finish = jax.vmap(train_body.finish, (None, 0), axis_name="devices", out_axes=None)
    return state, *jax.device_get(finish(state, sums))


def sums_with(**changes):
    """What two devices have added up; `changes` puts a value into the second one's share."""
    filled = jax.tree.map(lambda x: jnp.full((2, *x.shape), 0.5), PARAMS)
    one_each = jax.tree.map(lambda x: jnp.full(2, 4.0), PARAMS)
    sums = Sums(
        loss=jnp.ones(2),
        accuracy=jnp.ones(2),
        batch_stats={"mean": jnp.full((2, 2), 0.5)},
        grads=filled,
        norms=one_each,
        square_norms=one_each,
    )
    for name, (path, value) in changes.items():
        tree = getattr(sums, name)
        if path:
            *parents, last = path
            place = tree
            for parent in parents:
                place = place[parent]
            place[last] = place[last].at[1].set(value)
        else:
            tree = tree.at[1].set(value)
        sums = sums._replace(**{name: tree})
    return sums


def test_finite_step_is_taken():
    before, after, metrics = finish(sums_with())

    assert describe(metrics["finite"], TREES) is None
    assert after.step == 4
    assert (after.params["head"]["kernel"] != before.params["head"]["kernel"]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("loss", (), "the loss"),
        ("grads", ("head", "bias"), "the gradient of head/bias"),
        ("norms", ("head", "kernel"), "the norms of head/kernel"),
        ("batch_stats", ("mean",), "the running averages"),
    ],
)
def test_step_that_is_not_finite_changes_nothing_and_is_named(name, path, message, value):
    before, after, metrics = finish(sums_with(**{name: (path, value)}))

    assert message in describe(metrics["finite"], TREES)
    assert after.step == 4
    # But for the steps of the schedule.
    opt_state = optax.tree.set(after.opt_state, count=3)
    for field in ("params", "batch_stats", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, field), getattr(before, field))
    jax.tree.map(np.testing.assert_array_equal, opt_state, before.opt_state)


def test_learning_rate_goes_by_the_steps_that_are_counted():
    for sums in (sums_with(), sums_with(loss=((), np.inf))):
        _, after, metrics = finish(sums)
        assert metrics["learning_rate"] == SCHEDULE(3)
        assert optax.tree.get(after.opt_state, "count") == after.step == 4


def test_many_leaves_are_counted():
    tree = {f"layer{index}": 0.0 for index in range(9)}
    flags = np.array([False] * 5 + [True] * 4)

    assert describe({"gradient": flags}, {"gradient": tree}) == (
        "the gradient of layer0, layer1, layer2 and 2 other leaves"
    )
    assert describe({"gradient": flags & False}, {"gradient": tree}) == (
        "the gradient of all 9 leaves"
    )


@pytest.fixture
def config(data_dir, tmp_path):
    return dataclasses.replace(
        CONFIGS["digits"],
        **{"batch_size": 480, "epochs": 3.0, "eval_epochs": 3.0, "group_size": 60},
        **{"data_dir": data_dir, "workdir": tmp_path / "run"},
    )


def run(config):
    run_here(prepare(config))


def poison(monkeypatch, steps=(4, 5, 7)):
    """Makes a norm infinite on one device in the given steps, counted from 1."""
    real = clars_optax.value_and_grad_and_norms

    def poisoned(*args, **options):
        step = real(*args, **options)

        def value_and_grad_and_norms(params, state, batch, key):
            result, grads, norms = step(params, state, batch, key)
            is_hit = jnp.isin(state.step + 1, jnp.array(steps)) & (
                jax.lax.axis_index("devices") == 5
            )
            norms["head"]["kernel"] = jnp.where(is_hit, jnp.inf, norms["head"]["kernel"])
            return result, grads, norms

        return value_and_grad_and_norms

    monkeypatch.setattr(body.clars_optax, "value_and_grad_and_norms", poisoned)


def test_run_stops_with_the_state_before_and_goes_on_from_it(config, tmp_path, monkeypatch):
    whole = dataclasses.replace(config, workdir=tmp_path / "whole")
    run(whole)
    poison(monkeypatch)

    with pytest.raises(RunError) as error:
        run(config)

    assert str(error.value) == (
        "step 4 is not finite: the norms of head/kernel. Nothing of it was kept, and there is "
        "a checkpoint of step 3. Look at the data and the learning rate, of which another "
        "needs a new run. To try the step again, start the same command; to pass over it, add "
        "--on-nonfinite skip."
    )
    assert error.value.exit_code == 1
    with Checkpoints(config.workdir / CHECKPOINTS) as checkpoints:
        assert checkpoints.steps() == [3]
    assert numbers_of(config.workdir)[:3] == numbers_of(whole.workdir)[:3]

    monkeypatch.undo()
    run(config)

    assert numbers_of(config.workdir) == numbers_of(whole.workdir)


def test_steps_are_passed_over_and_counted(config, monkeypatch):
    poison(monkeypatch)

    run(dataclasses.replace(config, on_nonfinite="skip", max_nonfinite_steps=2))

    *lines, _ = lines_of(config.workdir)
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 0, 1, 0, 0]
    assert (config.workdir / "curves.png").exists()


@pytest.mark.long
def test_too_many_in_a_row_end_the_run(config, monkeypatch):
    poison(monkeypatch, [2, 3, 4])

    text = r"step 4 is not finite: .* a checkpoint of step 3\. .* --max-nonfinite-steps above 2\."
    with pytest.raises(RunError, match=text):
        run(dataclasses.replace(config, on_nonfinite="skip", max_nonfinite_steps=2))


@pytest.mark.long
def test_weights_that_overflow_are_named(config, data_dir):
    with pytest.raises(RunError, match=r"step \d is not finite: .*weights|gradient"):
        run(dataclasses.replace(config, optimizer="sgd", learning_rate=1e38, group_size=1))
