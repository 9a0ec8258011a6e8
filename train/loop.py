"""A whole run: data, training, evaluation, and what is left of it in the run folder."""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from rich.console import Console

import clars_optax
from train import checkpoint, metrics
from train.body import Batch, make_eval_body
from train.build import accumulation_of, image_shape_of, network_of, training_of
from train.config import Config
from train.data import Dataset, dataset_of
from train.data.dataset import Example
from train.data.pipeline import eval_batches, train_batches
from train.plots import plot_curves
from train.progress import TrainingProgress
from train.run_folder import CHECKPOINTS, open_run_folder
from train.state import TrainState
from train.step import AXIS, pmap_eval_step, replicate, shard
from train.validation import validate, validate_with_data


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run needs besides the options: open data and a run folder.

    Attributes:
        config: the options.
        dataset: the data set.
        train_examples: its training split.
        test_examples: its held-out split.
        network: the network.
        layers: names of its weights, from the first to the last.
        workdir: the run folder.
    """

    config: Config
    dataset: Dataset
    train_examples: Sequence[Example]
    test_examples: Sequence[Example]
    network: nn.Module
    layers: Sequence[str]
    workdir: Path

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.config.num_steps(len(self.train_examples))


def prepare(config: Config) -> Prepared:
    """Checks the options, opens the data and opens the run folder.

    Raises:
        ValueError: options do not fit together, or not with the data or with what the run folder
            holds; then nothing has been written to it.
        FileNotFoundError: the data are not there.
    """
    dataset = dataset_of(config.dataset, config.data_dir, config.augmentation)
    validate(config, dataset, jax.device_count(), jax.process_count())
    train_examples = dataset.load(config.data_dir, "train")
    test_examples = dataset.load(config.data_dir, "test")
    validate_with_data(config, len(train_examples))
    network = network_of(config, dataset, jax.device_count())
    layers = _weights_by_depth(network, image_shape_of(config, dataset))
    workdir = open_run_folder(config, dataset, len(train_examples), jax.devices())
    return Prepared(config, dataset, train_examples, test_examples, network, layers, workdir)


def train(prepared: Prepared) -> None:
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
    num_train = len(prepared.train_examples)
    state, train_step = training_of(config, prepared.dataset, prepared.network, num_train, devices)
    evaluate = _make_evaluation(prepared, devices)
    eval_examples = max(round(config.eval_epochs * num_train), 1)

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
                line = _train_line(jax.device_get(measured), prepared.layers)
                line["step_seconds"] = time.perf_counter() - started
                line["data_seconds"] = pieces.waited()
                epoch = step * config.batch_size / num_train
                writer.write(step, {"epoch": epoch, **line})
                progress.update(
                    step,
                    seconds=line["step_seconds"],
                    waited=line["data_seconds"],
                    loss=line["train_loss"],
                    accuracy=line["train_accuracy"],
                )
                since_evaluation = step * config.batch_size % eval_examples
                if step == num_steps or since_evaluation < config.batch_size:
                    evaluation = evaluate(state)
                    writer.write(step, {"epoch": epoch, **evaluation})
                    checkpoint.save(checkpoints, state, evaluation)

    accuracy = evaluation["test_accuracy"]
    if is_first:
        title = (
            f"{config.model} with {config.optimizer} on {config.dataset}, batch {config.batch_size}"
        )
        lines = metrics.read(prepared.workdir)
        plot_curves(lines, title, prepared.layers, prepared.workdir / "curves.png")
    console.print(f"waiting for data: {progress.waiting():.1%} of the time of the steps")
    console.print(f"held-out accuracy: {accuracy:.2%} of {len(prepared.test_examples)} examples")
    console.print(f"run folder: {prepared.workdir}")


class _PiecesOnDevices:
    """Sends the pieces of the batches to the devices, one ahead of the computation."""

    def __init__(self, batches: Iterator[Batch], devices: Sequence[jax.Device]) -> None:
        self._batches = batches
        self._devices = devices
        # One thread, for an iterator serves only one at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pieces")
        self._ahead: collections.deque[Future[Batch | None]] = collections.deque()
        self._seconds = 0.0
        self.prefetch()

    def take(self) -> Batch:
        started = time.perf_counter()
        batch = self._ahead.popleft().result()
        self._seconds += time.perf_counter() - started
        assert batch is not None
        return batch

    def prefetch(self) -> None:
        self._ahead.append(self._thread.submit(self._fetch))

    def _fetch(self) -> Batch | None:
        batch = next(self._batches, None)
        return batch and jax.block_until_ready(shard(batch, self._devices))

    def waited(self) -> float:
        """Returns the seconds since the last call in which the devices had to wait for a piece."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _pieces(prepared: Prepared, done: int) -> Iterator[Batch]:
    """Returns this process's shares of the pieces from the first step to do to the last one."""
    config = prepared.config
    per_step = accumulation_of(config, jax.device_count()).pieces
    batches = train_batches(
        prepared.dataset,
        prepared.train_examples,
        batch_size=config.transfer_size or config.batch_size,
        image_size=image_shape_of(prepared.config, prepared.dataset)[0],
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        first_batch=done * per_step,
    )
    return itertools.islice(batches, (prepared.num_steps - done) * per_step)


def _make_evaluation(
    prepared: Prepared, devices: Sequence[jax.Device]
) -> Callable[[TrainState], dict[str, float]]:
    """Returns a function that gives mean loss and accuracy over all examples."""
    eval_step = pmap_eval_step(make_eval_body(prepared.dataset, AXIS), devices)
    at_a_time = accumulation_of(prepared.config, len(devices)).at_a_time

    def evaluate(state: TrainState) -> dict[str, float]:
        batches = eval_batches(
            prepared.dataset,
            prepared.test_examples,
            batch_size=at_a_time * len(devices),
            image_size=image_shape_of(prepared.config, prepared.dataset)[0],
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


def _weights_by_depth(network: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Names the weights in the order in which the network makes them, which is that of depth."""
    by_depth: list[str] = []

    def init(key: jax.Array) -> None:
        # What leaves a transformation of JAX is sorted by name.
        images = jnp.zeros((1, *image_shape))
        params = network.init(key, images, train=False)["params"]
        is_weight = traverse_util.flatten_dict(clars_optax.default_mask(params), sep="/")
        by_depth.extend(
            path for path in traverse_util.flatten_dict(params, sep="/") if is_weight[path]
        )

    jax.eval_shape(init, jax.random.key(0))
    return by_depth
