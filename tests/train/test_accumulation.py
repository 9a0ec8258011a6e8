"""Micro-batches, pieces, groups of devices and dropout in a training step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clars_optax
from tests.train.steps import (
    BATCH_SIZE,
    DIGITS,
    MODEL,
    SHAPE,
    Setting,
    assert_close,
    batch_of,
    make,
    new_state,
    run,
    take_step,
)
from train.state import draw_state
from train.step import init_state

pytestmark = pytest.mark.usefixtures("compiled_fast")


def twice(batch):
    """A batch whose halves are alike: BatchNorm's statistics of a half are those of the whole."""
    half = jax.tree.map(lambda x: x[: BATCH_SIZE // 2], batch)
    return jax.tree.map(lambda x: np.concatenate([x, x]), half)


@pytest.mark.parametrize("name", ["clars", "lars", "sgd"])
@pytest.mark.parametrize("way", [{"microbatch_size": BATCH_SIZE // 2}, {"pieces": 2}], ids=str)
def test_microbatches_and_pieces_have_the_mean_gradient(name, way):
    in_parts, whole = Setting(1, name, **way), Setting(1, name)

    actual, metrics = take_step(new_state(in_parts), twice(batch_of(0)), in_parts)
    expected, expected_metrics = take_step(new_state(whole), twice(batch_of(0)), whole)

    assert_close(actual.params, expected.params, 1e-5)
    assert_close(actual.batch_stats, expected.batch_stats, 1e-5)
    assert_close(metrics, expected_metrics, 1e-4)


def test_microbatches_are_the_same_on_one_device_and_on_many():
    """With BatchNorm statistics of each micro-batch, the number of devices changes nothing."""
    settings = [
        Setting(num_devices=4, bn_group=1),
        Setting(num_devices=2, bn_group=1, microbatch_size=8),
        Setting(num_devices=1, bn_group=1, microbatch_size=8),
        Setting(num_devices=1, bn_group=1, microbatch_size=8, pieces=2),
        Setting(num_devices=1, bn_group=1, pieces=4),
    ]
    first, *others = (run(2, setting) for setting in settings)

    for other in others:
        assert_close(other, first, 1e-4)


def test_groups_of_devices_have_statistics_of_their_own():
    grouped, apart = Setting(bn_group=2), Setting(num_devices=4, bn_group=1)

    assert_close(run(2, grouped), run(2, apart), 1e-4)
    assert not np.allclose(run(1, grouped)[0][2]["loss"], run(1)[0][2]["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"microbatch_size": 8},
        {"pieces": 4, "group_size": 4},
        {"pieces": 2, "microbatch_size": 8, "group_size": 2},
    ],
    ids=str,
)
def test_norms_of_a_part_are_of_the_first_examples(way):
    part = Setting(num_devices=1, bn_group=1, num_norm_examples=12, **way)
    state, batch = new_state(part), batch_of(0)
    model, params = MODEL.clone(axis_name=None), jax.device_get(state.params)
    at_a_time = part.microbatch_size or BATCH_SIZE // part.pieces

    def loss_fn(params, images, labels):
        logits, _ = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            (images - DIGITS.mean[0]) / DIGITS.std[0],
            train=True,
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    norms_of = jax.jit(
        clars_optax.value_and_grad_and_norms(
            loss_fn, batch_argnums=(1, 2), group_size=part.group_size
        )
    )
    results = [
        norms_of(
            params,
            batch["image"][i : i + at_a_time].astype(np.float32),
            batch["label"][i : i + at_a_time],
        )
        for i in range(0, BATCH_SIZE, at_a_time)
    ]
    grad = np.mean([grads["head"]["kernel"] for _, grads, _ in results], axis=0)
    norms = np.concatenate([norms["head"]["kernel"] for *_, norms in results])
    norms = norms[: 12 // part.group_size]

    _, metrics = take_step(state, batch, part)

    ratio, factor = (metrics[name]["head"]["kernel"] for name in ("trust_ratio", "variance_factor"))
    expected = 0.01 * np.linalg.norm(params["head"]["kernel"]) / (norms.mean() + 1e-6)
    np.testing.assert_allclose(ratio, expected, rtol=1e-4)
    np.testing.assert_allclose(factor, np.mean(norms**2) / np.sum(grad**2), rtol=1e-4)


def test_dropout_has_other_masks_in_each_step_piece_and_device():
    seen = []

    class Recorder(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            x = nn.BatchNorm(use_running_average=not train)(images)
            x = jnp.mean(x, axis=(1, 2))
            x = nn.Dense(10)(x)
            if train:
                key = jax.random.key_data(self.make_rng("dropout"))
                jax.debug.callback(lambda key: seen.append(tuple(key.tolist())), key)
            return x

    setting = Setting(num_devices=2, name="sgd", pieces=2)
    transformation = make(setting)[0].transformation
    draw = functools.partial(
        draw_state, model=Recorder(), image_shape=SHAPE, transformation=transformation
    )
    state = init_state(draw, setting.seed, setting.devices)
    for i in range(2):
        state, _ = take_step(state, batch_of(i), setting)
    jax.effects_barrier()

    assert len(set(seen)) == 2 * 2 * 2


def test_dropout_goes_through_the_norms():
    setting = Setting(num_devices=2, with_dropout=True)
    state = new_state(setting)

    first, metrics = take_step(state, batch_of(0), setting)
    again, _ = take_step(new_state(setting), batch_of(0), setting)
    other = Setting(num_devices=2, with_dropout=True, seed=1)
    differs, _ = take_step(new_state(setting), batch_of(0), other)

    assert np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert not np.array_equal(first.params["head"]["kernel"], differs.params["head"]["kernel"])
