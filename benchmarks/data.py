"""How many photos a second the input pipeline feeds, beside tf.data on the same photos.

`python -m benchmarks.data` prints one table; `benchmarks/README.md` says what is in it.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks import photos
from benchmarks.report import machine
from benchmarks.rounds import time_round
from benchmarks.timing import Pairs
from train.data import imagenet
from train.data.dataset import Example
from train.data.pipeline import eval_batches, train_batches

# What is measured, and the split that it reads.
SPLITS = {"train": "train", "eval": "test"}

Round = Callable[[str], float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    header = machine()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _say(f"making {options.photos} photos ...")
        with contextlib.redirect_stdout(sys.stderr):
            photos.write(folder, options.photos)
        examples = {name: imagenet.load(folder, split) for name, split in SPLITS.items()}
        ours, theirs = _our_rounds(examples, options), None
        if options.tensorflow_python:
            _say("starting TensorFlow ...")
            version, theirs = _tensorflow_rounds(stack, folder, examples, options)
            header += f", TensorFlow {version}"
        num_cores = len(os.sched_getaffinity(0))
        num_images = options.batches * options.batch_size
        print(f"{header}; medians of {options.pairs} pairs of {num_images:,} photos\n")
        print("| pipeline | photos/s | per core | tf.data, per core | ratio | 5-95 % |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name in SPLITS:
            _say(f"{name} ...")
            cells = _measure(ours, theirs, name, options.pairs, num_images, num_cores)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if theirs is None:
        _say("TensorFlow is not there: install '.[imagenet]', or name an environment that has it.")


def _measure(
    ours: Round, theirs: Round | None, name: str, num_pairs: int, num_images: int, num_cores: int
) -> list[str]:
    """Times both in turn, and returns the cells of a row."""
    seconds = Pairs([], [])
    for _ in range(num_pairs):
        seconds.base.append(ours(name))
        if theirs is not None:
            seconds.other.append(theirs(name))
    rate = num_images / seconds.base_median
    cells = [f"{rate:,.0f}", f"{rate / num_cores:,.0f}"]
    if theirs is None:
        return [*cells, "", "", ""]
    low, high = seconds.interval
    their_rate = num_images / float(np.median(seconds.other))
    # A ratio of rates: their seconds by ours.
    return [
        *cells,
        f"{their_rate / num_cores:,.0f}",
        f"{seconds.ratio:.2f}",
        f"{low:.2f}-{high:.2f}",
    ]


def _our_rounds(examples: dict[str, Sequence[Example]], options: argparse.Namespace) -> Round:
    sizes = {"batch_size": options.batch_size, "image_size": options.image_size}

    def endless_evaluation() -> Iterator[dict[str, np.ndarray]]:
        for _ in itertools.count():
            yield from eval_batches(imagenet.DATASET, examples["eval"], **sizes)

    batches: dict[str, Iterator[dict[str, np.ndarray]]] = {
        "train": train_batches(imagenet.DATASET, examples["train"], **sizes, seed=0),
        "eval": endless_evaluation(),
    }
    return lambda name: time_round(batches[name], options.batches)


def _tensorflow_rounds(
    stack: contextlib.ExitStack,
    folder: Path,
    examples: dict[str, Sequence[Example]],
    options: argparse.Namespace,
) -> tuple[str, Round]:
    """Starts the process with TensorFlow; returns its version too."""
    for name, split in examples.items():
        (folder / name).mkdir()
        for index, example in enumerate(split):
            (folder / name / f"{index:08d}.jpg").write_bytes(example["image"])
    sizes = (options.batch_size, options.image_size, options.batches)
    process = stack.enter_context(
        subprocess.Popen(
            [options.tensorflow_python, "-m", "benchmarks.data_tensorflow", folder]
            + [str(size) for size in sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )

    def answer() -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{options.tensorflow_python} ended: its message says why.")
        return line.strip()

    def time_theirs(name: str) -> float:
        assert process.stdin is not None
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        return float(answer())

    return answer(), time_theirs


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--photos", type=int, default=2048, help="of each split")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, default=128, help="photos")
    parser.add_argument("--batches", type=int, default=8, help="that are timed at once")
    parser.add_argument("--pairs", type=int, default=15, help="of rounds, of ours and of tf.data")
    here = sys.executable if importlib.util.find_spec("tensorflow") else None
    parser.add_argument(
        "--tensorflow-python",
        default=here,
        metavar="PYTHON",
        help="the Python of an environment with TensorFlow; default: this one, if it has it",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
