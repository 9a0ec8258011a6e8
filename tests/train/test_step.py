import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import clars_optax
from train.body import Accumulation, TrainBody, make_eval_body
from train.data import DATASETS
from train.models import densenet, resnet
from train.optimizers import make_optimizer
from train.step import AXIS, TrainStep, init_state, pmap_eval_step, shard

BATCH_SIZE = 32
DIGITS = DATASETS["digits"]
SHAPE = DIGITS.image_shape(8)
MODEL = resnet.ResNet(stage_sizes=(1,), num_classes=10, width=4, axis_name=AXIS)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A training step to make; hashable, so that each is compiled once."""

    num_devices: int = 8
    name: str = "clars"
    pieces: int = 1
    microbatch_size: int | None = None
    num_norm_examples: int | None = None
    bn_group: int | None = None
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    seed: int = 0
    with_dropout: bool = False

    @property
    def devices(self):
        return jax.local_devices()[: self.num_devices]

    @property
    def model(self):
        if self.with_dropout:
            return densenet.DenseNet(
                block_sizes=(2,), num_classes=10, growth_rate=4, dropout_rate=0.5, axis_name=AXIS
            )
        group = self.bn_group or self.num_devices
        if group == 1:
            return MODEL.clone(axis_name=None)
        groups = [list(range(i, i + group)) for i in range(0, self.num_devices, group)]
        return MODEL.clone(axis_index_groups=groups if len(groups) > 1 else None)


SETTING = Setting()


@functools.cache
def make(setting=SETTING):
    schedule = optax.constant_schedule(0.5)
    share = BATCH_SIZE // setting.num_devices
    optimizer = make_optimizer(
        setting.name,
        schedule,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-3,
        weight_decay_mask="weights",
        trust_coefficient=None,
        max_trust_ratio=None,
        batch_size=BATCH_SIZE,
        group_size=1,
        num_steps=10,
    )
    num_norms = share if setting.num_norm_examples is None else setting.num_norm_examples
    accumulation = Accumulation(
        pieces=setting.pieces,
        piece_size=share // setting.pieces,
        microbatch_size=setting.microbatch_size,
        num_norm_examples=num_norms if optimizer.needs_norms else 0,
    )
    body = TrainBody(
        DIGITS,
        optimizer,
        schedule,
        accumulation,
        AXIS,
        label_smoothing=setting.label_smoothing,
        seed=setting.seed,
    )
    return optimizer, body, TrainStep(body, setting.devices)


def new_state(setting=SETTING):
    transformation = make(setting)[0].transformation
    return init_state(
        setting.model, SHAPE, transformation, setting.seed, setting.devices, setting.ema_decay
    )


def batch_of(step):
    rng = np.random.default_rng(step)
    labels = rng.integers(0, 10, BATCH_SIZE).astype(np.int32)
    images = rng.integers(0, 17, (BATCH_SIZE, 8, 8, 1)).astype(np.uint8)
    images[np.arange(BATCH_SIZE), labels % 8, :, 0] = 16
    return {"image": images, "label": labels}


class Pieces:
    """A batch, cut into pieces each of which has an equal share for every device."""

    def __init__(self, batch, setting):
        pieces = [
            jax.tree.map(lambda x, i=i: np.split(x, setting.pieces)[i], batch)
            for i in range(setting.pieces)
        ]
        self.left = [shard(piece, setting.devices) for piece in pieces]
        self.prefetched = 0

    def take(self):
        return self.left.pop(0)

    def prefetch(self):
        self.prefetched += 1


def take_step(state, batch, setting=SETTING):
    pieces = Pieces(batch, setting)
    result = make(setting)[2](state, pieces)
    assert not pieces.left
    assert pieces.prefetched == setting.pieces
    return result


def run(num_steps, setting=SETTING):
    """What stands after each step."""
    state, history = new_state(setting), []
    for i in range(num_steps):
        state, metrics = take_step(state, batch_of(i), setting)
        history.append(jax.device_get((state.params, state.batch_stats, metrics)))
    return history


def assert_close(actual, expected, tolerance):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


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

    (loss, expected_stats), grads, norms = clars_optax.value_and_grad_and_norms(
        loss_fn, has_aux=True, batch_argnums=(1, 2)
    )(params, batch["image"].astype(np.float32), batch["label"])
    tx = clars_optax.clars(0.5, weight_decay=1e-3)
    updates, _ = tx.update(grads, tx.init(params), params, example_grad_norms=norms)

    state, metrics = take_step(state, batch, setting)

    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(state.params, optax.apply_updates(params, updates), 1e-5)
    assert_close(state.batch_stats, expected_stats, 1e-5)


def test_same_seed_same_numbers():
    jax.tree.map(np.testing.assert_array_equal, run(2), run(2))


def test_another_seed_other_parameters():
    kernels = [new_state(Setting(seed=s)).params["stem_conv"]["kernel"] for s in (0, 1)]

    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("setting", [Setting(1, "sgd"), Setting(8, "sgd"), Setting(8, pieces=2)])
def test_only_the_first_step_compiles(setting, caplog):
    step = TrainStep(make(setting)[1], setting.devices)
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
        Setting(num_devices=8, bn_group=1),
        Setting(num_devices=2, bn_group=1, microbatch_size=4),
        Setting(num_devices=1, bn_group=1, microbatch_size=4),
        Setting(num_devices=1, bn_group=1, microbatch_size=4, pieces=4),
        Setting(num_devices=1, bn_group=1, pieces=8),
    ]
    first, *others = (run(2, setting) for setting in settings)

    for other in others:
        assert_close(other, first, 1e-4)


def test_groups_of_devices_have_statistics_of_their_own():
    grouped, apart = Setting(bn_group=2), Setting(num_devices=4, bn_group=1)

    assert_close(run(2, grouped), run(2, apart), 1e-4)
    assert not np.allclose(run(1, grouped)[0][2]["loss"], run(1)[0][2]["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    "way", [{}, {"microbatch_size": 4}, {"pieces": 4}, {"pieces": 2, "microbatch_size": 4}], ids=str
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

    norms = [
        clars_optax.value_and_grad_and_norms(loss_fn, batch_argnums=(1, 2))(
            params,
            batch["image"][i : i + at_a_time].astype(np.float32),
            batch["label"][i : i + at_a_time],
        )[2]["head"]["kernel"]
        for i in range(0, BATCH_SIZE, at_a_time)
    ]
    mean_norm = np.concatenate(norms)[:12].mean()

    _, metrics = take_step(state, batch, part)

    ratio = metrics["trust_ratio"]["head"]["kernel"]
    expected = 0.01 * np.linalg.norm(params["head"]["kernel"]) / (mean_norm + 1e-6)
    np.testing.assert_allclose(ratio, expected, rtol=1e-4)


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
    state = init_state(Recorder(), SHAPE, make(setting)[0].transformation, 0, setting.devices)
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


def test_moving_average_of_the_weights():
    setting = Setting(num_devices=2, ema_decay=0.3)
    state = new_state(setting)
    average = np.asarray(state.params["head"]["kernel"], np.float64)
    for step in range(3):
        state, _ = take_step(state, batch_of(step), setting)
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * np.asarray(state.params["head"]["kernel"])

    np.testing.assert_allclose(state.ema_params["head"]["kernel"], average, rtol=1e-5)
    assert state.eval_params is state.ema_params


def test_weights_are_evaluated_where_no_average_is_kept():
    state = new_state()

    assert state.eval_params is state.params


def test_evaluation_counts_every_example_once():
    state = new_state()
    evaluate = pmap_eval_step(make_eval_body(DIGITS, AXIS), jax.local_devices())
    batch = batch_of(0)
    logits = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
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
