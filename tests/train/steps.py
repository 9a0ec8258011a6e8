"""What the tests of training steps have in common: settings, batches, a small network's steps."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import optax

from train.body import Accumulation, TrainBody
from train.data import DATASETS
from train.models import resnet
from train.optimizers import make_optimizer
from train.state import draw_state
from train.step import AXIS, TrainStep, init_state, replicate, shard

BATCH_SIZE = 32
DIGITS = DATASETS["digits"]
SHAPE = DIGITS.image_shape(8)
# A convolution, BatchNorm and a dense layer: each test compiles its gradient and its norms.
MODEL = resnet.ResNet(stage_sizes=(), num_classes=10, width=4, axis_name=AXIS)


class WithDropout(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name=AXIS)(images)
        x = nn.relu(nn.Dense(8)(x.reshape(len(x), -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10, name="head")(x)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A training step to make; hashable, so that each is compiled once."""

    num_devices: int = 8
    name: str = "clars"
    pieces: int = 1
    microbatch_size: int | None = None
    num_norm_examples: int | None = None
    group_size: int = 1
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
        """Always the same one: of another, a step would be compiled again."""
        return _model(self)


@functools.cache
def _model(setting):
    if setting.with_dropout:
        return WithDropout()
    group = setting.bn_group or setting.num_devices
    if group == 1:
        return MODEL.clone(axis_name=None)
    groups = [list(range(i, i + group)) for i in range(0, setting.num_devices, group)]
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
        group_size=setting.group_size,
        num_steps=10,
    )
    num_norms = share if setting.num_norm_examples is None else setting.num_norm_examples
    accumulation = Accumulation(
        pieces=setting.pieces,
        piece_size=share // setting.pieces,
        microbatch_size=setting.microbatch_size,
        group_size=setting.group_size,
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
    drawn = _drawn(setting.name, setting.ema_decay, setting.seed, setting.with_dropout)
    transformation = make(setting)[0].transformation
    return replicate(
        drawn.replace(apply_fn=setting.model.apply, tx=transformation), setting.devices
    )


@functools.cache
def _drawn(name, ema_decay, seed, with_dropout):
    """On the host, what all settings alike in these begin with."""
    setting = Setting(1, name, ema_decay=ema_decay, seed=seed, with_dropout=with_dropout)
    draw = functools.partial(
        draw_state,
        model=setting.model,
        image_shape=SHAPE,
        transformation=make(setting)[0].transformation,
        ema_decay=ema_decay,
    )
    return jax.device_get(init_state(draw, seed, setting.devices))


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
