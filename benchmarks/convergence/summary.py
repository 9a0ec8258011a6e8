"""What the table says: the best point of every grid, and how its seeds fared."""

import numpy as np
import pandas as pd

from benchmarks.convergence.table import POINT, ROW, RUN

TARGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
EARLY_EPOCHS = (1, 2, 5)

# In validation accuracy: a point of a grid that is as good as the best one for most purposes.
CLOSE = 0.02


def runs(table: pd.DataFrame) -> pd.DataFrame:
    """Makes a row for each run: its last epoch, and whether it `diverged`.

    It did where its loss was not finite any more, or ended no better than that of equal
    probabilities for ten classes. The accuracy of the former is that of guessing, 0.1.
    """
    last = table.loc[table.groupby(RUN)["epoch"].idxmax()]
    ended_early = last["test_accuracy"].isna()
    accuracies = last[["valid_accuracy", "test_accuracy"]].mask(ended_early, 0.1)
    diverged = ended_early | (last["train_loss"] >= np.log(10))
    return last.assign(**accuracies, diverged=diverged).reset_index(drop=True)


def grid(table: pd.DataFrame) -> pd.DataFrame:
    """Makes a row for each point of a grid, with means over the seeds that all its points have."""
    last = runs(table)
    last["runs_of_seed"] = last.groupby([*ROW, "seed"])["epoch"].transform("size")
    common = last[last["runs_of_seed"] == last.groupby(ROW)["runs_of_seed"].transform("max")]
    columns = {
        "valid_accuracy": "mean",
        "test_accuracy": "mean",
        "diverged": "mean",
        "seed": "size",
    }
    return common.groupby(POINT).agg(columns).reset_index().rename(columns={"seed": "seeds"})


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Picks the best point of each grid, by validation accuracy; of equals the smallest rate."""
    points = grid(table)
    return points.loc[points.groupby(ROW)["valid_accuracy"].idxmax(), POINT].reset_index(drop=True)


def epochs_of_chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Picks the rows of the runs at the best point of their grid."""
    return table.merge(chosen(table), on=POINT)


def results(table: pd.DataFrame) -> pd.DataFrame:
    """Makes a row for each network, batch size and optimizer.

    Returns:
        The columns of `ROW` and the chosen point; `mean`, `low` and `high` of the test accuracy
        over `seeds` seeds; `diverged` and `close`, the shares of the grid's points that diverged
        for a seed and whose accuracy is within 0.02 of the best; for each target t that any run
        reached, `steps_to_t` and `epochs_to_t`, means over the seeds until the validation accuracy
        is first that high, NaN if a seed never gets there; for the first epochs e `loss_e`, the
        mean loss.
    """
    best = epochs_of_chosen(table)
    points = grid(table)
    top = points.groupby(ROW)["valid_accuracy"].transform("max")
    points = points.assign(
        diverged=points["diverged"] > 0, close=points["valid_accuracy"] >= top - CLOSE
    )
    final = runs(best)
    accuracy = final.groupby(POINT)["test_accuracy"]
    columns = {
        "mean": accuracy.mean(),
        "low": accuracy.min(),
        "high": accuracy.max(),
        "seeds": accuracy.size(),
    }
    for target in TARGETS:
        if target == TARGETS[0] or (best["valid_accuracy"] >= target).any():
            first = best[best["valid_accuracy"] >= target].groupby(RUN)[["epoch", "step"]].min()
            reached = first.reindex(pd.MultiIndex.from_frame(final[RUN])).groupby(POINT)
            columns[f"epochs_to_{target:g}"] = (
                reached["epoch"].mean().where(reached["epoch"].count() == columns["seeds"])
            )
            columns[f"steps_to_{target:g}"] = (
                reached["step"].mean().where(reached["step"].count() == columns["seeds"])
            )
    for epoch in EARLY_EPOCHS:
        columns[f"loss_{epoch}"] = best[best["epoch"] == epoch].groupby(POINT)["train_loss"].mean()
    shares = points.groupby(ROW)[["diverged", "close"]].mean()
    return pd.DataFrame(columns).reset_index().merge(shares, on=ROW)


def effect(ours: pd.Series, theirs: pd.Series) -> float:
    """Returns the difference of two mean accuracies, or 0 where it is within the seeds' spread.

    Args:
        ours: a row of `results`.
        theirs: the row that it is compared with. There is an effect where the worst seed of the
            one is better than the best seed of the other.
    """
    if max(ours["low"], theirs["low"]) <= min(ours["high"], theirs["high"]):
        return 0.0
    return float(np.round(ours["mean"] - theirs["mean"], 6))
