"""The curves of a run, from its metrics."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.metrics import is_eval

_MOST_NAMES = 20


def plot_curves(
    lines: Sequence[dict[str, Any]], title: str, layers: Sequence[str], path: Path
) -> None:
    """Draws loss, accuracy, learning rate and the layers' trust ratios over the steps.

    Args:
        lines: the lines of `metrics.jsonl`.
        title: stands above the curves.
        layers: the leaves whose trust ratio is drawn, in order of depth.
        path: where the PNG goes.
    """
    train = [line for line in lines if not is_eval(line)]
    test = [line for line in lines if is_eval(line)]
    figure = Figure(figsize=(12, 8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title)
    (loss, accuracy), (rate, ratio) = figure.subplots(2, 2)

    _curve(loss, train, "train_loss", "training batch")
    _curve(loss, test, "test_loss", "held out", marker=".")
    loss.set(title="Loss", ylabel="cross-entropy [nats]", yscale="log")
    loss.legend()

    _curve(accuracy, train, "train_accuracy", "training batch")
    _curve(accuracy, test, "test_accuracy", "held out", marker=".")
    accuracy.set(title="Accuracy", ylabel="share of examples")
    accuracy.legend()

    _curve(rate, train, "learning_rate", "")
    rate.set(title="Learning rate", ylabel="learning rate")

    steps = [line["step"] for line in train]
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.95, len(layers)))
    # A legend of more names would not fit beside the curves.
    stride = -(-len(layers) // _MOST_NAMES)
    for index, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        values = _numbers(line["trust_ratio"][layer] for line in train)
        name = layer.removesuffix("/kernel") if index % stride == 0 else None
        ratio.plot(steps, values, color=colour, label=name)
    ratio.set(title="Trust ratio of each layer", ylabel="trust ratio", yscale="log")
    figure.legend(
        *ratio.get_legend_handles_labels(),
        loc="outside right lower",
        title="layers, input first" if stride == 1 else f"every {stride}th layer, input first",
        fontsize="small",
    )

    for axes in (loss, accuracy, rate, ratio):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    canvas.print_png(path)


def _curve(
    axes: Axes, lines: Sequence[dict[str, Any]], name: str, label: str, marker: str = ""
) -> None:
    steps = [line["step"] for line in lines]
    axes.plot(steps, _numbers(line[name] for line in lines), marker=marker, label=label)


def _numbers(values: Iterable[float | None]) -> np.ndarray:
    """Makes gaps of what was not finite."""
    return np.array([np.nan if value is None else value for value in values])
