"""Pictures of the table, one file per network and question."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.convergence import summary
from benchmarks.convergence.study import CONTENDERS

_PLAIN = list(dict.fromkeys(name.removesuffix(", warm-up") for name in CONTENDERS))


def accuracy_against_epoch(table: pd.DataFrame) -> Figure:
    """Draws the validation accuracy of the chosen runs; the band is from worst to best seed."""

    def draw(axes: Axes, part: pd.DataFrame) -> None:
        for name, rows in _by_optimizer(part):
            accuracy = rows.groupby("epoch")["valid_accuracy"]
            mean = accuracy.mean()
            axes.plot(mean.index, mean, label=name, **_style(name))
            axes.fill_between(
                mean.index, accuracy.min(), accuracy.max(), color=_style(name)["color"], alpha=0.15
            )
        axes.set(xlabel="epoch")

    figure = _panels(summary.epochs_of_chosen(table), draw)
    figure.axes[0].set_ylabel("validation accuracy")
    return figure


def accuracy_against_rate(table: pd.DataFrame) -> Figure:
    """Draws the final validation accuracy of the whole grid; of two warm-ups, the better one."""

    def draw(axes: Axes, part: pd.DataFrame) -> None:
        for name, rows in _by_optimizer(part):
            best = rows.groupby("learning_rate")["valid_accuracy"].max()
            axes.plot(best.index, best, marker=".", label=name, **_style(name))
        axes.set(xlabel="learning rate", xscale="log")

    figure = _panels(summary.grid(table), draw)
    figure.axes[0].set_ylabel("final validation accuracy")
    return figure


def steps_against_batch_size(table: pd.DataFrame) -> Figure:
    """Draws how many steps the chosen runs take to the targets that most optimizers reach.

    A point is missing where a seed does not get there.
    """
    results = summary.results(table)
    steps = [column for column in results.columns if column.startswith("steps_to_")]
    reached = results[steps].notna().mean()
    shown = list(reached[reached >= 0.5].index[-2:]) or steps[:1]
    figure = Figure(figsize=(5 * len(shown) + 2, 4), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for name, rows in _by_optimizer(results):
            axes.plot(rows["batch_size"], rows[column], marker="o", label=name, **_style(name))
        target = float(column.removeprefix("steps_to_"))
        axes.set(
            title=f"{target:.0%} of the validation images",
            xlabel="batch size",
            ylabel="steps",
            xscale="log",
            yscale="log" if results[column].notna().any() else "linear",
            xticks=sorted(results["batch_size"].unique()),
        )
        axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        axes.yaxis.set_minor_formatter(mpl.ticker.ScalarFormatter())
        axes.yaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a picture without the version of Matplotlib, so that the same is the same."""
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _panels(rows: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], None]) -> Figure:
    """Draws a panel for each batch size."""
    groups = list(rows.groupby("batch_size"))
    figure = Figure(figsize=(4 * len(groups) + 2, 4), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (batch_size, part) in zip(panels, groups, strict=True):
        draw(axes, part)
        axes.set_title(f"{batch_size:,} images per step")
        axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def _by_optimizer(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    groups = dict(list(rows.groupby("optimizer")))
    return [(name, groups[name]) for name in CONTENDERS if name in groups]


def _legend(figure: Figure) -> None:
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small"
    )


def _style(name: str) -> dict[str, Any]:
    """Gives an optimizer the same colour in all pictures, and a dashed line to its warm-up."""
    without = name.removesuffix(", warm-up")
    colour = mpl.colormaps["tab20"](_PLAIN.index(without) * 2 % 19)
    return {"color": colour, "linestyle": "-" if name == without else "--"}
