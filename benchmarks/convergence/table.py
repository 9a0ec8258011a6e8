"""The tidy table: a row for every run and epoch.

=============== ====================================================================================
network         a key of `study.NETWORKS`
batch_size      images per step
optimizer       a key of `study.CONTENDERS`
warmup          share of the run in which the learning rate rises
learning_rate   its peak
seed            of the run
epoch, step     so far; a run ends early where a loss is not finite
train_loss      mean over the epoch's steps, each before its update; in nats
valid_loss      of the images by which learning rates are chosen
valid_accuracy  share of these
test_accuracy   share of the test images; in the last row of a whole run
=============== ====================================================================================

Lines that begin with # say which command trained the following rows, when, and on which machine.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.convergence.training import Epoch, Run

ROW = ["network", "batch_size", "optimizer"]
POINT = [*ROW, "warmup", "learning_rate"]
RUN = [*POINT, "seed"]
COLUMNS = [*RUN, *Epoch._fields]

_FILE = "runs.csv"


def table_of(
    network: str,
    batch_size: int,
    optimizer: str,
    runs: Sequence[Run],
    results: Sequence[Sequence[Epoch]],
) -> pd.DataFrame:
    """Makes the table of the runs of an optimizer."""
    rows = [
        (network, batch_size, optimizer, run.warmup, run.learning_rate, run.seed, *epoch)
        for run, epochs in zip(runs, results, strict=True)
        for epoch in epochs
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def append(folder: Path, rows: pd.DataFrame, remark: str) -> None:
    """Adds rows to the table in a folder, and a line before them that says where they come from.

    The new table is renamed into place, so that one that is there is always whole.
    """
    path = folder / _FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text:
        text = ",".join(rows.columns) + "\n"
    if f"# {remark}\n" not in text:
        text += f"# {remark}\n"
    text += rows.to_csv(header=False, index=False, float_format="%.5g")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read(folder: Path) -> pd.DataFrame:
    """Reads the table in a folder; an empty one where there is none.

    Raises:
        ValueError: if it is no such table.
    """
    path = folder / _FILE
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    # A column of whole numbers would be read as integers.
    numbers = dict.fromkeys(["warmup", "learning_rate", *COLUMNS[-4:]], float)
    table = pd.read_csv(path, comment="#", dtype=numbers)
    if list(table.columns) != COLUMNS:
        raise ValueError(
            f"{path} has the columns {', '.join(table.columns)}, but expected are "
            f"{', '.join(COLUMNS)}: name another folder."
        )
    return table


def remarks(folder: Path) -> list[str]:
    """Reads where the rows come from."""
    lines = (folder / _FILE).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("# ") for line in lines if line.startswith("#")]
