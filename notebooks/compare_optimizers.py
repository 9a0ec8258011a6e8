# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CLARS beside SGD and LARS, with and without warm-up
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/clars-optax/clars_optax/blob/main/notebooks/compare_optimizers.ipynb)
#
# The repository holds the table of a study on Fashion-MNIST: every optimizer at several batch
# sizes, each with six runs to find its learning rate in, and three seeds at the best one. This
# notebook draws what is in it, and trains one of its rows again.

# %% tags=["skip-execution"]
# !apt-get -qq install dataset-fashion-mnist
# !git clone -q https://github.com/clars-optax/clars_optax
# %cd clars_optax
# %pip install -q -e '.[study]'

# %%
# %matplotlib inline
from pathlib import Path

import pandas as pd

import benchmarks
from benchmarks.convergence import plots, problem, summary, table
from benchmarks.convergence.study import CONTENDERS, NETWORKS, PRESETS
from benchmarks.convergence.training import Run, Trainer

folder = Path(benchmarks.__file__).parent / "results" / "convergence-cpu"
rows = table.read(folder)
print(*table.remarks(folder), sep="\n")
print(f"{len(summary.runs(rows))} runs")

# %% [markdown]
# ## What came out
#
# `mean`, `low` and `high` are the test accuracies of the three seeds. The learning rate was chosen
# by validation images, never by these. Where the ranges of two optimizers overlap, the table does
# not tell which is better.

# %%
results = summary.results(rows).set_index(["batch_size", "optimizer"])
results[["learning_rate", "warmup", "mean", "low", "high", "diverged", "close"]].round(3)

# %% [markdown]
# The validation accuracy over the run, at the best learning rate; the band is from the worst to the
# best seed.

# %%
plots.accuracy_against_epoch(rows)

# %% [markdown]
# How many steps it takes to a fixed accuracy. If larger batches were as good as more steps, the
# lines would fall with a slope of -1. A point is missing where a seed does not get there.

# %%
plots.steps_against_batch_size(rows)

# %% [markdown]
# How much the choice of the learning rate matters: the final accuracy of every point of the grid,
# for one seed. The rates of different optimizers are not comparable, but the widths of the hills
# are.

# %%
plots.accuracy_against_rate(rows)

# %% [markdown]
# ## One row again, live
#
# CLARS at the largest batch size, all training images in each step, at its best learning rate, with
# the three seeds of the table: the same initial weights, the same images in the same order. The
# study gave every run a core of its own; here all cores share the work and add up in another order,
# so that the numbers are close, not equal.

# %%
study = PRESETS["cpu"]
network, batch_size = study.networks[0], study.batch_sizes[-1]
best = summary.epochs_of_chosen(rows)
committed = best[(best["optimizer"] == "clars") & (best["batch_size"] == batch_size)]
point = committed["learning_rate"].iloc[0], committed["warmup"].iloc[0]
runs = [Run(*point, seed) for seed in study.seeds]

trainer = Trainer(
    NETWORKS[network](), problem.load(study, None), study.microbatch_size, study.epochs
)
epochs = [trainer.train(CONTENDERS["clars"], batch_size, [run])[0] for run in runs]
again = table.table_of(network, batch_size, "clars", runs, epochs)

accuracies = pd.concat({"again": again, "of the table": committed}, names=["source"]).reset_index(
    level="source"
)
accuracies = accuracies[accuracies["epoch"].isin(range(0, study.epochs + 1, 5))]
accuracies.pivot_table("valid_accuracy", "epoch", ["seed", "source"]).round(3)

# %%
for name, those in {"again": again, "of the table": committed}.items():
    (row,) = summary.results(those).to_dict("records")
    print(f"{name:>12}: {row['mean']:.1%} ({row['low']:.1%}-{row['high']:.1%}) of the test images")
