"""A whole run: data, training, evaluation, and what is left of it in the run folder."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from rich.console import Console

import clars_optax
from train import checkpoint, metrics
from train.config import Config
from train.data import DATASETS, Dataset
from train.data.dataset import Example
from train.data.pipeline import eval_batches, train_batches
from train.models import make_model
from train.optimizers import make_optimizer
from train.plots import plot_curves
from train.progress import TrainingProgress
from train.run_folder import CHECKPOINTS, open_run_folder
from train.schedules import make_schedule
from train.state import TrainState
from train.step import (
    AXIS,
    Accumulation,
    Batch,
    TrainBody,
    TrainStep,
    init_state,
    make_eval_body,
    pmap_eval_step,
    replicate,
    shard,
)
from train.validation import validate, validate_with_data


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run needs besides the options: open data and a run folder.

    Attributes:
        config: the options.
        dataset: the data set.
        train_examples: its training split.
        test_examples: its held-out split.
        workdir: the run folder.
    """

    config: Config
    dataset: Dataset
    train_examples: Sequence[Example]
    test_examples: Sequence[Example]
    workdir: Path

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.config.num_steps(len(self.train_examples))

    @property
    def image_size(self) -> int:
        """Height and width of what the network sees."""
        return self.config.image_size or self.dataset.image_size


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        workdir: the run folder.
        test_accuracy: share of the held-out examples whose label was found.
    """

    workdir: Path
    test_accuracy: float


def run(config: Config) -> Result:
    """Trains, evaluates and writes the run folder; `prepare` and `train` in one.

    Args:
        config: the options.

    Returns:
        The run folder and the held-out accuracy.

    Raises:
        ValueError: as `prepare`.
        FileNotFoundError: likewise.
    """
    return train(prepare(config))


def prepare(config: Config) -> Prepared:
    """Checks the options, opens the data and opens the run folder.

    Raises:
        ValueError: options do not fit together, or not with the data or with what the run folder
            holds; then nothing has been written to it.
        FileNotFoundError: the data are not there.
    """
    validate(config, jax.device_count(), jax.process_count())
    dataset = DATASETS[config.dataset]
    train_examples = dataset.load(config.data_dir, "train")
    test_examples = dataset.load(config.data_dir, "test")
    validate_with_data(config, len(train_examples))
    workdir = open_run_folder(config, len(train_examples), jax.devices())
    return Prepared(config, dataset, train_examples, test_examples, workdir)


def train(prepared: Prepared) -> Result:
    """Trains to the end, from the start or from the last checkpoint in the run folder."""
    config, num_steps = prepared.config, prepared.num_steps
    devices = jax.devices()
    is_first = jax.process_index() == 0
    # The others know the same numbers, and would write over one another.
    console = Console(soft_wrap=True, highlight=False, quiet=not is_first)
    console.print(
        f"{config.model} with {config.optimizer} on {config.dataset}: "
        f"{num_steps} steps of {config.batch_size} examples, "
        f"{len(devices)} x {devices[0].device_kind}"
    )
    model = make_network(prepared)
    layers = _weights_by_depth(model, prepared)
    state, train_step = make_training(prepared, model, devices)
    evaluate = _make_evaluation(prepared, devices)
    epochs_per_step = config.batch_size / len(prepared.train_examples)

    evaluation: dict[str, float] = {}
    with checkpoint.open_folder(prepared.workdir / CHECKPOINTS) as checkpoints:
        if checkpoints.latest_step() is not None:
            restored, evaluation = checkpoint.restore(checkpoints, state)
            state = replicate(restored, devices)
            console.print(f"going on from step {checkpoints.latest_step()}")
        done = int(state.step)
        pieces = _PiecesOnDevices(_pieces(prepared, done), devices)
        with (
            metrics.MetricsWriter(prepared.workdir if is_first else None, done) as writer,
            TrainingProgress(num_steps, config.batch_size, console, done) as progress,
        ):
            for step in range(done + 1, num_steps + 1):
                started = time.perf_counter()
                state, measured = train_step(state, pieces)
                line = _train_line(jax.device_get(measured), layers)
                line["step_seconds"] = time.perf_counter() - started
                line["data_seconds"] = pieces.waited()
                epoch = step * epochs_per_step
                writer.write(step, {"epoch": epoch, **line})
                progress.update(
                    step, line["step_seconds"], line["train_loss"], line["train_accuracy"]
                )
                passed = [int(at * epochs_per_step / config.eval_epochs) for at in (step - 1, step)]
                if step == num_steps or passed[0] < passed[1]:
                    evaluation = evaluate(state)
                    writer.write(step, {"epoch": epoch, **evaluation})
                    checkpoint.save(checkpoints, state, evaluation)

    accuracy = evaluation["test_accuracy"]
    if is_first:
        title = (
            f"{config.model} with {config.optimizer} on {config.dataset}, batch {config.batch_size}"
        )
        lines = metrics.read(prepared.workdir)
        plot_curves(lines, title, layers, prepared.workdir / "curves.png")
    console.print(f"held-out accuracy: {accuracy:.2%} of {len(prepared.test_examples)} examples")
    console.print(f"run folder: {prepared.workdir}")
    return Result(prepared.workdir, accuracy)


class _PiecesOnDevices:
    """Sends the pieces of the batches to the devices, one ahead of the computation."""

    def __init__(self, batches: Iterator[Batch], devices: Sequence[jax.Device]) -> None:
        self._batches = batches
        self._devices = devices
        self._next: Batch | None = None
        self._seconds = 0.0
        self.prefetch()

    def take(self) -> Batch:
        if self._next is None:
            raise StopIteration
        piece, self._next = self._next, None
        return piece

    def prefetch(self) -> None:
        started = time.perf_counter()
        batch = next(self._batches, None)
        self._seconds += time.perf_counter() - started
        self._next = None if batch is None else shard(batch, self._devices)

    def waited(self) -> float:
        """Returns the seconds since the last call in which there was no batch to send."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _pieces(prepared: Prepared, done: int) -> Iterator[Batch]:
    """Returns this process's shares of the pieces from the first step to do to the last one."""
    config = prepared.config
    per_step = _accumulation(config).pieces
    batches = train_batches(
        prepared.dataset,
        prepared.train_examples,
        batch_size=config.transfer_size or config.batch_size,
        image_size=prepared.image_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        first_batch=done * per_step,
    )
    return itertools.islice(batches, (prepared.num_steps - done) * per_step)


def make_network(prepared: Prepared) -> nn.Module:
    """Makes the network of a run, BatchNorm groups included."""
    config, num_devices = prepared.config, jax.device_count()
    group = config.bn_group or num_devices
    groups = None
    if 1 < group < num_devices:
        groups = [list(range(i, i + group)) for i in range(0, num_devices, group)]
    return make_model(
        config.model,
        num_classes=prepared.dataset.num_classes,
        norm_momentum=config.norm_momentum,
        axis_name=None if group == 1 else AXIS,
        axis_index_groups=groups,
        dtype=jnp.dtype(config.dtype),
        dropout_rate=config.dropout_rate,
        zero_init_residual=config.zero_init_residual,
    )


def _accumulation(config: Config) -> Accumulation:
    """Says what one device does, of what the options say of all of them."""
    num_devices = jax.device_count()
    piece_size = (config.transfer_size or config.batch_size) // num_devices
    microbatch_size = config.microbatch_size
    if microbatch_size is not None and microbatch_size >= piece_size:
        microbatch_size = None
    return Accumulation(
        pieces=config.batch_size // (piece_size * num_devices),
        piece_size=piece_size,
        microbatch_size=microbatch_size,
        group_size=config.group_size,
        num_norm_examples=(config.num_norm_examples or config.batch_size) // num_devices,
    )


def make_training(
    prepared: Prepared, model: nn.Module, devices: Sequence[jax.Device]
) -> tuple[TrainState, TrainStep]:
    """Makes the initial state and the training step.

    Args:
        prepared: the run.
        model: its network, from `make_network`.
        devices: those of all processes.
    """
    config, num_train = prepared.config, len(prepared.train_examples)
    schedule = make_schedule(
        config.schedule,
        peak=config.peak_learning_rate,
        end=config.end_learning_rate,
        warmup_steps=config.in_steps(config.warmup_epochs, num_train),
        num_steps=prepared.num_steps,
        boundaries=[config.in_steps(epoch, num_train) for epoch in config.decay_epochs],
    )
    optimizer = make_optimizer(
        config.optimizer,
        schedule,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        weight_decay_mask=config.weight_decay_mask,
        trust_coefficient=config.trust_coefficient,
        max_trust_ratio=config.max_trust_ratio,
        batch_size=config.batch_size,
        group_size=config.group_size,
        num_steps=prepared.num_steps,
    )
    accumulation = _accumulation(config)
    if not optimizer.needs_norms:
        accumulation = dataclasses.replace(accumulation, num_norm_examples=0)
    body = TrainBody(
        prepared.dataset,
        optimizer,
        schedule,
        accumulation,
        AXIS,
        label_smoothing=config.label_smoothing,
        seed=config.seed,
    )
    state = init_state(
        model,
        prepared.dataset.image_shape(prepared.image_size),
        optimizer.transformation,
        config.seed,
        devices,
        config.ema_decay,
    )
    return state, TrainStep(body, devices)


def _make_evaluation(
    prepared: Prepared, devices: Sequence[jax.Device]
) -> Callable[[TrainState], dict[str, float]]:
    """Returns a function that gives mean loss and accuracy over all examples."""
    eval_step = pmap_eval_step(make_eval_body(prepared.dataset, AXIS), devices)
    accumulation = _accumulation(prepared.config)
    at_a_time = accumulation.microbatch_size or accumulation.piece_size

    def evaluate(state: TrainState) -> dict[str, float]:
        batches = eval_batches(
            prepared.dataset,
            prepared.test_examples,
            batch_size=at_a_time * jax.device_count(),
            image_size=prepared.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        sums = {"loss": 0.0, "correct": 0.0, "examples": 0.0}
        for batch in batches:
            of_batch = jax.device_get(eval_step(state, shard(batch, devices)))
            sums = {name: value + float(of_batch[name]) for name, value in sums.items()}
        return {
            "test_loss": sums["loss"] / sums["examples"],
            "test_accuracy": sums["correct"] / sums["examples"],
        }

    return evaluate


def _train_line(measured: dict[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Makes a line of the record of what a step measured, biases and scales left out."""
    line: dict[str, Any] = {
        "train_loss": float(measured.pop("loss")),
        "train_accuracy": float(measured.pop("accuracy")),
        "learning_rate": float(measured.pop("learning_rate")),
    }
    for name, tree in measured.items():
        by_layer = traverse_util.flatten_dict(tree, sep="/")
        line[name] = {layer: float(by_layer[layer]) for layer in layers}
    return line


def _weights_by_depth(model: nn.Module, prepared: Prepared) -> list[str]:
    """Names the weights in the order in which the model makes them, which is that of depth."""
    by_depth: list[str] = []

    def init(key: jax.Array) -> None:
        # What leaves a transformation of JAX is sorted by name.
        images = jnp.zeros((1, *prepared.dataset.image_shape(prepared.image_size)))
        params = model.init(key, images, train=False)["params"]
        is_weight = traverse_util.flatten_dict(clars_optax.default_mask(params), sep="/")
        by_depth.extend(
            path for path in traverse_util.flatten_dict(params, sep="/") if is_weight[path]
        )

    jax.eval_shape(init, jax.random.key(0))
    return by_depth
