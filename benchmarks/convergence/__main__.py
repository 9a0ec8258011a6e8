"""The command line of the study.

`python -m benchmarks.convergence` trains what is missing in the folder's table, row by row, and
reports on all of it. Interrupted, the same command goes on.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.convergence import report, summary, table
from benchmarks.convergence.problem import load
from benchmarks.convergence.rows import train
from benchmarks.convergence.study import PRESETS


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    study = PRESETS[options.preset]
    folder = options.output or Path("runs") / f"convergence-{options.preset}"
    problem = load(study, options.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    done = set(table.read(folder)[table.ROW].itertuples(index=False, name=None))
    rows = [
        row
        for row in itertools.product(study.networks, study.batch_sizes, study.contenders)
        if row not in done
    ]
    _say(
        f"{study.num_runs} runs of {study.epochs} epochs of {study.num_train:,} images, in "
        f"{study.num_rows} rows, of which {study.num_rows - len(rows)} are there."
    )
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    for row, new, description in train(rows, study, problem):
        remark = (
            f"python -m benchmarks.convergence --preset {options.preset}; {started}; {description}"
        )
        table.append(folder, new, remark)
        (result,) = summary.results(new).to_dict("records")
        spread = f"{result['low']:.1%}-{result['high']:.1%}"
        _say(f"{', '.join(map(str, row))}: {result['mean']:.1%} ({spread})")
    report.write(folder)
    _say(f"The table and what it says: {folder}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="default: cpu")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: runs/convergence-PRESET"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder of tensorflow-datasets or of Fashion-MNIST's files; default: as for training",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
