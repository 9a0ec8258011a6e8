import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from train.data import DATASETS
from train.models import resnet
from train.optimizers import make_optimizer
from train.step import (
    AXIS,
    Norms,
    init_state,
    make_eval_body,
    make_train_body,
    pmap_eval_step,
    pmap_train_step,
    shard,
)

BATCH_SIZE = 32
DIGITS = DATASETS["digits"]
MODEL = resnet.ResNet(stage_sizes=(1,), num_classes=10, width=4, axis_name=AXIS)
NORMS = Norms()


def batch_of(step):
    rng = np.random.default_rng(step)
    labels = rng.integers(0, 10, BATCH_SIZE).astype(np.int32)
    images = rng.integers(0, 17, (BATCH_SIZE, 8, 8, 1)).astype(np.uint8)
    images[np.arange(BATCH_SIZE), labels % 8, :, 0] = 16
    return {"image": images, "label": labels}


@functools.cache
def make(name="clars", norms=NORMS):
    schedule = optax.constant_schedule(0.5)
    optimizer = make_optimizer(
        name, schedule, momentum=0.9, weight_decay=1e-3, batch_size=BATCH_SIZE, group_size=1
    )
    body = make_train_body(DIGITS, optimizer, schedule, norms, AXIS)
    return optimizer, body


@functools.cache
def train_step(num_devices, name="clars", norms=NORMS):
    return pmap_train_step(make(name, norms)[1], jax.local_devices()[:num_devices])


def new_state(num_devices, name="clars", norms=NORMS, seed=0):
    transformation = make(name, norms)[0].transformation
    return init_state(MODEL, DIGITS, transformation, seed, jax.local_devices()[:num_devices])


def run(num_devices, num_steps, name="clars", norms=NORMS):
    """What stands after each step."""
    state, history = new_state(num_devices, name, norms), []
    for i in range(num_steps):
        batch = shard(batch_of(i), num_devices)
        state, metrics = train_step(num_devices, name, norms)(state, batch)
        history.append(jax.device_get((state.params, state.batch_stats, metrics)))
    return history


def assert_close(actual, expected, tolerance):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


@pytest.mark.parametrize("name", ["clars", "lars", "sgd"])
def test_one_device_and_eight_agree(name):
    one, eight = run(1, 5, name), run(8, 5, name)

    assert_close(eight[0], one[0], 1e-5)
    assert_close(eight[4], one[4], 1e-3)


def test_pmap_and_shard_map_agree():
    mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,))
    specs = (PartitionSpec(), PartitionSpec(AXIS))
    mapped = jax.jit(jax.shard_map(make()[1], mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
    state = new_state(8)
    for expected in run(8, 3):
        state, metrics = jax.block_until_ready(mapped(state, batch_of(int(state.step))))
        assert_close(jax.device_get((state.params, state.batch_stats, metrics)), expected, 1e-5)


def test_same_seed_same_numbers():
    jax.tree.map(np.testing.assert_array_equal, run(8, 2), run(8, 2))


def test_another_seed_other_parameters():
    kernels = [new_state(1, seed=seed).params["stem_conv"]["kernel"] for seed in (0, 1)]

    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_only_the_first_step_compiles(num_devices, caplog):
    step = pmap_train_step(make("sgd")[1], jax.local_devices()[:num_devices])
    state = new_state(num_devices, "sgd")
    compiled = []
    for i in range(3):
        with jax.log_compiles():
            state, _ = jax.block_until_ready(step(state, shard(batch_of(i), num_devices)))
        compiled.append("Compiling" in caplog.text)
        caplog.clear()

    assert compiled == [True, False, False]


@pytest.mark.parametrize("name", ["clars", "lars", "sgd"])
def test_microbatches_have_the_mean_gradient(name):
    """With two equal halves the statistics of BatchNorm are those of the whole batch."""
    half = jax.tree.map(lambda x: x[: BATCH_SIZE // 2], batch_of(0))
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), half)
    in_halves = Norms(microbatch_size=BATCH_SIZE // 2)

    actual, _ = train_step(1, name, in_halves)(new_state(1, name, in_halves), shard(batch, 1))
    expected, _ = train_step(1, name)(new_state(1, name), shard(batch, 1))

    assert_close(actual.params, expected.params, 1e-5)
    assert_close(actual.batch_stats, expected.batch_stats, 1e-5)


def test_norms_of_a_part_give_the_gradient_of_all():
    part = run(8, 1, norms=Norms(num_examples=1))[0]
    whole = run(8, 1)[0]

    # Biases have no layer-wise rate: they show the gradient alone.
    assert_close(part[0]["head"]["bias"], whole[0]["head"]["bias"], 1e-6)
    ratios = [metrics["trust_ratio"]["head"]["kernel"] for _, _, metrics in (part, whole)]
    assert ratios[0] != pytest.approx(ratios[1], rel=1e-3)


def test_evaluation_counts_every_example_once():
    devices = jax.local_devices()
    state = new_state(8)
    evaluate = pmap_eval_step(make_eval_body(DIGITS, AXIS), devices)
    batch = batch_of(0)
    logits = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
        (batch["image"].astype(np.float32) - DIGITS.mean) / np.asarray(DIGITS.std, np.float32),
        train=False,
    )
    mask = (np.arange(BATCH_SIZE) < 19).astype(np.float32)

    sums = evaluate(state, shard({**batch, "mask": mask}, 8))

    losses = -jax.nn.log_softmax(logits)[np.arange(BATCH_SIZE), batch["label"]]
    correct = np.argmax(logits, -1) == batch["label"]
    assert sums["examples"] == 19
    assert sums["correct"] == correct[:19].sum()
    np.testing.assert_allclose(sums["loss"], losses[:19].sum(), rtol=1e-5)


def test_shard_keeps_the_order():
    shares = shard({"x": np.arange(12)}, 4)

    np.testing.assert_array_equal(shares["x"], np.arange(12).reshape(4, 3))
