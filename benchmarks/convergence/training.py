"""Trains runs of an optimizer from their first epoch to their last."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from benchmarks.convergence.problem import Problem, Split
from benchmarks.convergence.programs import NetworkPrograms, OptimizerPrograms, State
from benchmarks.convergence.study import Contender

_EVAL_SIZE = 500

Chunk = tuple[jax.Array, jax.Array]


class Run(NamedTuple):
    """A point of a grid with a seed.

    Attributes:
        learning_rate: peak of the schedule.
        warmup: share of the run in which the rate rises to it.
        seed: of the initial weights, of the order of the images and of their augmentation.
    """

    learning_rate: float
    warmup: float
    seed: int


class Epoch(NamedTuple):
    """What is known of a run after an epoch.

    Attributes:
        epoch: passes over the images so far; 0 before the first step.
        step: steps so far.
        train_loss: mean over the epoch's steps, each before its update, in nats; NaN for epoch 0.
        valid_loss: of the images by which learning rates are chosen.
        valid_accuracy: share of these.
        test_accuracy: share of the test images; NaN before the last epoch.
    """

    epoch: int
    step: int
    train_loss: float
    valid_loss: float
    valid_accuracy: float
    test_accuracy: float


class Trainer:
    """Trains a network with whatever optimizer.

    Args:
        network: the network.
        problem: the images.
        microbatch_size: images that go through the network, and BatchNorm, at a time.
        epochs: length of every run.
    """

    def __init__(
        self, network: nn.Module, problem: Problem, microbatch_size: int, epochs: int
    ) -> None:
        self._network = NetworkPrograms(network)
        self._problem = problem
        self._microbatch_size = microbatch_size
        self._epochs = epochs
        self._train = jax.device_put((problem.train.images, problem.train.labels))
        self._valid, self._test = _chunks(problem.valid), _chunks(problem.test)
        self._optimizers: dict[tuple[Contender, int], OptimizerPrograms] = {}

    def train(
        self, contender: Contender, batch_size: int, runs: Sequence[Run]
    ) -> list[list[Epoch]]:
        """Trains runs side by side.

        Args:
            contender: the optimizer.
            batch_size: images per step.
            runs: points of the optimizer's grid.

        Returns:
            For each run its epochs from 0 on, up to the last one with finite losses.
        """
        num_images = len(self._problem.train)
        steps = num_images // batch_size
        rates = np.stack(
            [contender.rates(run.learning_rate, run.warmup, self._epochs * steps) for run in runs]
        )
        seeds = np.array([run.seed for run in runs], np.int32)
        programs = self._programs_of(contender, batch_size, self._epochs * steps)
        pieces = programs.accumulation.pieces
        gradients = [
            self._network.gradient(
                contender.group_size, programs.accumulation.norm_examples_of(piece)
            )
            for piece in range(pieces)
        ]
        state, sums = programs.init(seeds)
        number = 0
        nothing = np.full(len(runs), np.nan)
        columns = [nothing, *self._measure(state, self._valid), nothing]
        results = [[Epoch(0, 0, *values)] for values in np.stack(columns, axis=1).tolist()]
        for epoch in range(1, self._epochs + 1):
            generators = [np.random.default_rng((run.seed, epoch)) for run in runs]
            order = np.stack([rng.permutation(num_images) for rng in generators])
            losses = []
            for batch in np.split(order, steps, axis=1):
                for gradient, indices in zip(gradients, np.split(batch, pieces, 1), strict=True):
                    sums = gradient(state, sums, *self._train, indices, seeds, np.int32(number))
                    number += 1
                losses.append(sums.loss / pieces)
                state, sums = programs.finish(state, sums, rates[:, number // pieces - 1])
            train_loss, test_accuracy = np.mean(losses, axis=0), nothing
            valid_loss, valid_accuracy = self._measure(state, self._valid)
            if epoch == self._epochs:
                _, test_accuracy = self._measure(state, self._test)
            finite = np.isfinite(train_loss + valid_loss)
            columns = [train_loss, valid_loss, valid_accuracy, test_accuracy]
            rows = np.stack(columns, axis=1).tolist()
            for epochs, values, is_finite in zip(results, rows, finite, strict=True):
                if len(epochs) == epoch and is_finite:
                    epochs.append(Epoch(epoch, epoch * steps, *values))
            if not np.any(finite):
                break
        return results

    def _programs_of(
        self, contender: Contender, batch_size: int, num_steps: int
    ) -> OptimizerPrograms:
        key = (contender, batch_size)
        if key not in self._optimizers:
            self._optimizers[key] = OptimizerPrograms(
                self._network,
                self._problem.train.images.shape[1:],
                contender,
                batch_size=batch_size,
                microbatch_size=self._microbatch_size,
                num_steps=num_steps,
            )
        return self._optimizers[key]

    def _measure(self, state: State, chunks: list[Chunk]) -> tuple[np.ndarray, np.ndarray]:
        """Computes the mean loss and the accuracy of each run."""
        sums = [self._network.evaluate(state, *chunk) for chunk in chunks]
        loss, correct = np.sum(sums, axis=0) / sum(len(labels) for _, labels in chunks)
        return loss, correct


def _chunks(split: Split) -> list[Chunk]:
    """Copies images and labels to the device, in parts that are evaluated at a time."""
    return [
        jax.device_put((split.images[i : i + _EVAL_SIZE], split.labels[i : i + _EVAL_SIZE]))
        for i in range(0, len(split), _EVAL_SIZE)
    ]
