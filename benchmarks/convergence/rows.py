"""Trains rows of the grid, each an optimizer at a batch size, in processes of their own."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

import jax
import pandas as pd

from benchmarks.convergence import summary, table
from benchmarks.convergence.problem import Problem
from benchmarks.convergence.study import CONTENDERS, NETWORKS, Study
from benchmarks.convergence.training import Run, Trainer
from benchmarks.report import machine

Row = tuple[str, int, str]


def train(
    rows: Sequence[Row], study: Study, problem: Problem
) -> Iterator[tuple[Row, pd.DataFrame, str]]:
    """Trains rows of the grid, and yields each as it is done.

    On a CPU each core takes runs of its own: that is twice as fast as all cores for one run.
    """
    # A fork would share the locks of JAX's threads.
    context = multiprocessing.get_context("spawn")
    shares = _shares_of_cores(study)
    queue = context.Queue()
    for share in shares:
        queue.put(share)
    with ProcessPoolExecutor(
        len(shares), context, initializer=_start, initargs=(study, problem, queue)
    ) as pool:
        futures: dict[Future[tuple[pd.DataFrame, str]], Row] = {
            pool.submit(_train_row, row): row for row in rows
        }
        try:
            for future in as_completed(futures):
                yield futures[future], *future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class _Worker:
    """What a process knows from its start."""

    study: Study
    problem: Problem
    trainers: dict[str, Trainer]


def _shares_of_cores(study: Study) -> list[set[int] | None]:
    """Says for each process which cores it may use; None for whichever it likes."""
    if study.side_by_side:
        return [None]
    if not hasattr(os, "sched_getaffinity"):  # macOS and Windows
        return [None] * (os.cpu_count() or 1)
    return [{core} for core in os.sched_getaffinity(0)]


def _start(study: Study, problem: Problem, queue: Any) -> None:
    if not study.side_by_side:
        jax.config.update("jax_platforms", "cpu")
    share = queue.get()
    if share is not None:
        os.sched_setaffinity(0, share)
    _Worker.study, _Worker.problem, _Worker.trainers = study, problem, {}


def _train_row(row: Row) -> tuple[pd.DataFrame, str]:
    network, batch_size, name = row
    study = _Worker.study
    if network not in _Worker.trainers:
        _Worker.trainers[network] = Trainer(
            NETWORKS[network](), _Worker.problem, study.microbatch_size, study.epochs
        )
    trainer = _Worker.trainers[network]

    def train(points: Sequence[tuple[float, float]], seeds: Sequence[int]) -> pd.DataFrame:
        runs = [Run(*point, seed) for point in points for seed in seeds]
        parts = [runs] if study.side_by_side else [[run] for run in runs]
        results = [
            epochs for part in parts for epochs in trainer.train(CONTENDERS[name], batch_size, part)
        ]
        return table.table_of(network, batch_size, name, runs, results)

    tuning = train(CONTENDERS[name].grid, study.tuning_seeds)
    further = [seed for seed in study.seeds if seed not in study.tuning_seeds]
    if not further:
        return tuning, machine(with_load=False)
    best = summary.chosen(tuning)[["learning_rate", "warmup"]]
    chosen = train(best.to_numpy().tolist(), further)
    return pd.concat([tuning, chosen], ignore_index=True), machine(with_load=False)
