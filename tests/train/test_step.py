import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import clars_optax
from tests.train.steps import (
    BATCH_SIZE,
    DIGITS,
    MODEL,
    Pieces,
    Setting,
    assert_close,
    batch_of,
    make,
    new_state,
    run,
    take_step,
)
from train.body import make_eval_body
from train.step import AXIS, TrainStep, pmap_eval_step, shard

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.mark.parametrize("name", ["clars", "lars", "sgd", "lena"])
def test_one_device_and_eight_agree(name):
    one, eight = (run(5, Setting(num_devices=n, name=name)) for n in (1, 8))

    assert_close(eight[0], one[0], 1e-5)
    assert_close(eight[4], one[4], 1e-3)


def test_pmap_and_shard_map_agree():
    mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,))
    specs = (PartitionSpec(), PartitionSpec(AXIS))
    body = make()[1].step
    mapped = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
    state = new_state()
    for expected in run(3):
        state, metrics = jax.block_until_ready(mapped(state, batch_of(int(state.step))))
        assert_close(jax.device_get((state.params, state.batch_stats, metrics)), expected, 1e-5)


def test_step_is_that_of_the_library():
    """One device, one step: what somebody would write by hand."""
    setting = Setting(num_devices=1, label_smoothing=0.1)
    state, batch = new_state(setting), batch_of(0)
    params, batch_stats = jax.device_get((state.params, state.batch_stats))
    model = MODEL.clone(axis_name=None)

    def loss_fn(params, images, labels):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            (images - DIGITS.mean[0]) / DIGITS.std[0],
            train=True,
            mutable=["batch_stats"],
        )
        log_probabilities = jax.nn.log_softmax(logits)
        target = 0.9 * jax.nn.one_hot(labels, 10) + 0.1 / 10
        return -jnp.mean(jnp.sum(target * log_probabilities, axis=-1)), updated["batch_stats"]

    value_and_grad_and_norms = jax.jit(
        clars_optax.value_and_grad_and_norms(loss_fn, has_aux=True, batch_argnums=(1, 2))
    )
    (loss, expected_stats), grads, norms = value_and_grad_and_norms(
        params, batch["image"].astype(np.float32), batch["label"]
    )
    tx = clars_optax.clars(0.5, weight_decay=1e-3)
    updates, _ = tx.update(grads, tx.init(params), params, example_grad_norms=norms)

    state, metrics = take_step(state, batch, setting)

    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(state.params, optax.apply_updates(params, updates), 1e-5)
    assert_close(state.batch_stats, expected_stats, 1e-5)


@pytest.mark.parametrize("name", ["clars", "lena"])
def test_new_state_has_the_types_of_a_restored_one(name):
    """Or what was compiled would not serve a run that goes on: checkpoints keep no weak types."""
    state = new_state(Setting(1, name, ema_decay=0.9))

    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(state))


def test_same_seed_same_numbers():
    jax.tree.map(np.testing.assert_array_equal, run(2), run(2))


def test_another_seed_other_parameters():
    kernels = [new_state(Setting(seed=s)).params["stem_conv"]["kernel"] for s in (0, 1)]

    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("setting", [Setting(1, "sgd"), Setting(8, "sgd"), Setting(8, pieces=2)])
def test_only_the_first_step_compiles(setting, caplog):
    # A body of its own: the steps of those of other tests may be compiled.
    step = TrainStep(make.__wrapped__(setting)[1], setting.devices)
    state = new_state(setting)
    compiled = []
    for i in range(3):
        pieces = Pieces(batch_of(i), setting)
        with jax.log_compiles():
            state, _ = step(state, pieces)
        compiled.append("Compiling" in caplog.text)
        caplog.clear()

    assert compiled == [True, False, False]


@pytest.mark.parametrize("setting", [Setting(name="sgd"), Setting(pieces=2)])
def test_old_state_gives_its_memory_to_the_new_one(setting):
    state = new_state(setting)

    take_step(state, batch_of(0), setting)

    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_moving_averages():
    setting = Setting(num_devices=2, ema_decay=0.3)
    state = new_state(setting)

    def values(state):
        now = {"params": state.params, "batch_stats": state.batch_stats}
        return jax.tree.map(lambda x: np.asarray(x, np.float64), now)

    expected = values(state)
    for step in range(3):
        state, _ = take_step(state, batch_of(step), setting)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda average, new, d=decay: d * average + (1 - d) * new, expected, values(state)
        )

    chex.assert_trees_all_close(
        jax.tree.map(np.float64, state.eval_variables), expected, rtol=1e-5, atol=1e-6
    )


def test_without_averages_the_last_weights_are_evaluated():
    state = new_state()

    assert state.eval_variables["params"] is state.params
    assert state.eval_variables["batch_stats"] is state.batch_stats


def test_evaluation_counts_every_example_once_with_the_averages():
    state = new_state(Setting(ema_decay=0.9))
    state = state.replace(ema=jax.tree.map(lambda x: 1.5 * x, state.ema))
    evaluate = pmap_eval_step(make_eval_body(DIGITS, AXIS), jax.local_devices())
    batch = batch_of(0)
    logits = state.apply_fn(
        state.ema,
        (batch["image"].astype(np.float32) - DIGITS.mean) / np.asarray(DIGITS.std, np.float32),
        train=False,
    )
    mask = (np.arange(BATCH_SIZE) < 19).astype(np.float32)

    sums = evaluate(state, shard({**batch, "mask": mask}, jax.local_devices()))

    losses = -jax.nn.log_softmax(logits)[np.arange(BATCH_SIZE), batch["label"]]
    correct = np.argmax(logits, -1) == batch["label"]
    assert sums["examples"] == 19
    assert sums["correct"] == correct[:19].sum()
    np.testing.assert_allclose(sums["loss"], losses[:19].sum(), rtol=1e-5)


def test_shard_keeps_the_order():
    shares = shard({"x": np.arange(12)}, jax.local_devices()[:4])

    np.testing.assert_array_equal(shares["x"], np.arange(12).reshape(4, 3))
