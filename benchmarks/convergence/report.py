"""What the table says, as tables and pictures: `python -m benchmarks.convergence.report FOLDER`."""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from benchmarks.convergence import plots, summary, table
from benchmarks.convergence.study import CONTENDERS

_PICTURES = {
    "epochs": plots.accuracy_against_epoch,
    "rates": plots.accuracy_against_rate,
    "steps": plots.steps_against_batch_size,
}


def write(folder: Path) -> None:
    """Writes report.md and the pictures into the folder that holds the table."""
    rows = table.read(folder)
    lines = ["# Convergence", ""]
    lines += [f"- {remark}" for remark in table.remarks(folder)]
    for network, part in rows.groupby("network"):
        lines += ["", f"## {network}", ""]
        for name, draw in _PICTURES.items():
            picture = f"{network}-{name}.png"
            plots.save(draw(part), folder / picture)
            lines.append(f"![{draw.__name__.replace('_', ' ')}]({picture})")
        lines += _tables(part)
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tables(rows: pd.DataFrame) -> Iterator[str]:
    results = summary.results(rows)
    targets = [t for t in summary.TARGETS if f"epochs_to_{t:g}" in results.columns][-3:]
    header = ["optimizer", "rate", "warm-up", "test accuracy", "worst-best seed", "less clars"]
    header += [f"epochs to {target:.0%}" for target in targets]
    header += [f"loss, epoch {epoch}" for epoch in summary.EARLY_EPOCHS]
    header += ["grid diverged", "grid close"]
    for batch_size, part in results.groupby("batch_size"):
        yield from ("", f"### {batch_size:,} images per step", "")
        yield f"| {' | '.join(header)} |"
        yield "|" + " --- |" * len(header)
        by_name = part.set_index("optimizer")
        for name in [name for name in CONTENDERS if name in by_name.index]:
            result = by_name.loc[name]
            cells = [
                name,
                f"{result['learning_rate']:g}",
                f"{result['warmup']:.0%}" if result["warmup"] else "",
                f"{result['mean']:.1%}",
                f"{result['low']:.1%}-{result['high']:.1%}",
                _effect(result, by_name),
                *(_number(result[f"epochs_to_{target:g}"], ".1f") for target in targets),
                *(_number(result[f"loss_{epoch}"], ".2f") for epoch in summary.EARLY_EPOCHS),
                f"{result['diverged']:.0%}",
                f"{result['close']:.0%}",
            ]
            yield f"| {' | '.join(cells)} |"


def _effect(result: pd.Series, by_name: pd.DataFrame) -> str:
    """Says by how many points of accuracy an optimizer differs from CLARS."""
    if "clars" not in by_name.index or result.name == "clars":
        return ""
    effect = summary.effect(result, by_name.loc["clars"])
    return f"{100 * effect:+.1f}" if effect else "none"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence.report",
        description="Writes tables and pictures of a study into its folder.",
    )
    parser.add_argument("folder", type=Path, help="holds runs.csv")
    folder = parser.parse_args(arguments).folder
    write(folder)
    print(folder / "report.md")


if __name__ == "__main__":
    main()
