"""A whole run: data, training, evaluation, and what is left of it in the run folder."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from rich.console import Console

import clars_optax
from train import checkpoint, metrics
from train.config import Config, refuse_used_workdir
from train.data import DATASETS, Dataset
from train.data.dataset import Example
from train.data.pipeline import eval_batches, train_batches
from train.models import MODELS
from train.optimizers import make_optimizer
from train.plots import plot_curves
from train.progress import TrainingProgress
from train.schedules import warmup_then_polynomial
from train.state import TrainState
from train.step import (
    AXIS,
    Norms,
    TrainStep,
    init_state,
    make_eval_body,
    make_train_body,
    pmap_eval_step,
    pmap_train_step,
    shard,
)


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
    """Trains, evaluates and writes the run folder.

    Args:
        config: the options.

    Returns:
        The run folder and the held-out accuracy.

    Raises:
        ValueError: if options do not fit together; then nothing has been written.
    """
    devices = jax.local_devices()
    config.validate(len(devices))
    dataset = DATASETS[config.dataset]
    train_examples = dataset.load(config.data_dir, "train")
    test_examples = dataset.load(config.data_dir, "test")
    workdir = _make_workdir(config)
    _write_config(workdir, config, devices)

    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{config.model} with {config.optimizer} on {config.dataset}: "
        f"{config.num_steps} steps of {config.batch_size} examples, "
        f"{len(devices)} x {devices[0].device_kind}"
    )
    model = MODELS[config.model](
        num_classes=dataset.num_classes, norm_momentum=config.norm_momentum, axis_name=AXIS
    )
    layers = _weights_by_depth(model, dataset)
    state, train_step = _make_training(config, model, dataset, devices)
    evaluate = _make_evaluation(config, dataset, test_examples, devices)
    batches = train_batches(train_examples, config.batch_size, config.seed)

    with (
        metrics.MetricsWriter(workdir) as writer,
        TrainingProgress(config.num_steps, config.batch_size, console) as progress,
    ):
        for step in range(1, config.num_steps + 1):
            started = time.perf_counter()
            batch = shard(next(batches), len(devices))
            data_seconds = time.perf_counter() - started
            state, measured = train_step(state, batch)
            # Fetching the numbers waits for the step. CPU devices need that: steps dispatched
            # ahead of one another deadlock in their collectives.
            line = _train_line(jax.device_get(measured), layers)
            line["step_seconds"] = time.perf_counter() - started
            line["data_seconds"] = data_seconds
            epoch = step / config.steps_per_epoch
            writer.write(step, {"epoch": epoch, **line})
            progress.update(step, line["step_seconds"], line["train_loss"], line["train_accuracy"])
            if step == config.num_steps or int(epoch) > int((step - 1) / config.steps_per_epoch):
                evaluation = evaluate(state)
                writer.write(step, {"epoch": epoch, **evaluation})

    with checkpoint.open_folder(workdir / "checkpoints") as checkpoints:
        checkpoint.save(checkpoints, state)
    title = f"{config.model} with {config.optimizer} on {config.dataset}, batch {config.batch_size}"
    plot_curves(metrics.read(workdir), title, layers, workdir / "curves.png")
    accuracy = evaluation["test_accuracy"]
    console.print(f"held-out accuracy: {accuracy:.2%} of {len(test_examples)} examples")
    console.print(f"run folder: {workdir}")
    return Result(workdir, accuracy)


def _make_training(
    config: Config, model: nn.Module, dataset: Dataset, devices: Sequence[jax.Device]
) -> tuple[TrainState, TrainStep]:
    schedule = warmup_then_polynomial(
        config.peak_learning_rate,
        round(config.warmup_epochs * config.steps_per_epoch),
        config.num_steps,
    )
    optimizer = make_optimizer(
        config.optimizer,
        schedule,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size,
        group_size=config.group_size,
    )
    norms = Norms(
        group_size=config.group_size,
        num_examples=_share(config.num_norm_examples, devices),
        microbatch_size=_share(config.microbatch_size, devices),
    )
    state = init_state(model, dataset, optimizer.transformation, config.seed, devices)
    body = make_train_body(dataset, optimizer, schedule, norms, AXIS)
    return state, pmap_train_step(body, devices)


def _make_evaluation(
    config: Config, dataset: Dataset, examples: Sequence[Example], devices: Sequence[jax.Device]
) -> Callable[[TrainState], dict[str, float]]:
    """Returns a function that gives mean loss and accuracy over all examples."""
    eval_step = pmap_eval_step(make_eval_body(dataset, AXIS), devices)

    def evaluate(state: TrainState) -> dict[str, float]:
        sums = {"loss": 0.0, "correct": 0.0, "examples": 0.0}
        for batch in eval_batches(examples, config.batch_size):
            of_batch = jax.device_get(eval_step(state, shard(batch, len(devices))))
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


def _weights_by_depth(model: nn.Module, dataset: Dataset) -> list[str]:
    """Names the weights in the order in which the model makes them, which is that of depth."""
    by_depth: list[str] = []

    def init(key: jax.Array) -> None:
        # What leaves a transformation of JAX is sorted by name.
        params = model.init(key, jnp.zeros((1, *dataset.image_shape)), train=True)["params"]
        is_weight = traverse_util.flatten_dict(clars_optax.default_mask(params), sep="/")
        by_depth.extend(
            path for path in traverse_util.flatten_dict(params, sep="/") if is_weight[path]
        )

    jax.eval_shape(init, jax.random.key(0))
    return by_depth


def _share(size: int | None, devices: Sequence[jax.Device]) -> int | None:
    return None if size is None else size // len(devices)


def _make_workdir(config: Config) -> Path:
    workdir = config.workdir
    if workdir is None:
        workdir = Path("runs") / f"{config.config}-{datetime.now():%Y%m%d-%H%M%S}"
        refuse_used_workdir(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    return workdir


def _write_config(workdir: Path, config: Config, devices: Sequence[jax.Device]) -> None:
    record = {
        **dataclasses.asdict(config),
        "workdir": workdir,
        "learning_rate": config.base_learning_rate,
        "peak_learning_rate": config.peak_learning_rate,
        "num_steps": config.num_steps,
        "devices": [str(device) for device in devices],
        "versions": {
            package: metadata.version(package)
            for package in ("jax", "jaxlib", "flax", "optax", "numpy")
        },
    }
    text = json.dumps(record, indent=2, default=str)
    (workdir / "config.json").write_text(text + "\n", encoding="utf-8")
