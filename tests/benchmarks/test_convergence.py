import dataclasses
import functools
import itertools
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import clars_optax
from benchmarks.convergence import __main__ as convergence
from benchmarks.convergence import programs, report, summary, table
from benchmarks.convergence.problem import Problem, Split, augment, load
from benchmarks.convergence.study import CONTENDERS, PRESETS
from benchmarks.convergence.training import Run, Trainer
from tests.train import idx
from train import optimizers
from train.body import normalise
from train.data import fashion_mnist

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
pytestmark = pytest.mark.usefixtures("compiled_fast")
MICROBATCH, EPOCHS = 8, 2


class Net(nn.Module):
    """A convolution and two dense layers; BatchNorm if asked for."""

    batch_norm: bool

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), strides=2)(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.5)
        x = norm(x) if self.batch_norm else x
        return nn.Dense(10)(nn.tanh(nn.Dense(8)(x.reshape(len(x), -1))))


def split(number, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(number, dtype=np.int32) % 10
    noise = rng.integers(0, 100, (number, 6, 6, 1))
    return Split((noise + 15 * labels[:, None, None, None]).astype(np.uint8), labels)


@pytest.fixture(scope="module")
def problem():
    return Problem(split(32, 0), split(20, 1), split(510, 2))


def trained(net, problem, name, *groups, **options):
    """The epochs of all runs, those of a group in one program."""
    contender = dataclasses.replace(CONTENDERS[name], **options)
    trainer = Trainer(net, problem, MICROBATCH, EPOCHS)
    return [epochs for group in groups for epochs in trainer.train(contender, 16, group)]


def test_runs_side_by_side_are_those_of_one_after_another(problem):
    first, second = Run(0.1, 0.0, 0), Run(0.4, 0.3, 5)
    net = Net(batch_norm=True)
    # LENA's ratios depend on all that a step adds up: gradients and squared norms of groups.
    together = trained(net, problem, "lena", [first, second], group_size=4)
    alone = trained(net, problem, "lena", [first], [second], group_size=4)
    np.testing.assert_allclose(together, alone, rtol=2e-4)
    assert alone[0][-1].train_loss != alone[1][-1].train_loss


def slow_epochs(net, problem, run, make, norm_examples=None, group_size=1):
    """Trains by the definitions: the gradient of every example, and Optax."""
    num_images, steps = len(problem.train), EPOCHS * len(problem.train) // 16
    schedule = CONTENDERS["sgd"].rates(run.learning_rate, run.warmup, steps)
    tx = optax.with_extra_args_support(make(lambda step: jnp.asarray(schedule)[step]))
    variables = net.init(jax.random.key(run.seed), jnp.zeros((1, 6, 6, 1)), train=False)
    params = variables["params"]
    state = tx.init(params)

    def loss_fn(params, pixels, label):
        logits = net.apply(
            {"params": params}, normalise(pixels[None], fashion_mnist.DATASET), train=True
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits[0], label)

    example_grads = jax.jit(jax.vmap(jax.value_and_grad(loss_fn), in_axes=(None, 0, 0)))
    losses = []
    for epoch in range(1, EPOCHS + 1):
        order = np.random.default_rng((run.seed, epoch)).permutation(num_images)
        of_epoch = []
        for batch in order.reshape(-1, 16):
            values, grads = example_grads(
                params, problem.train.images[batch], problem.train.labels[batch]
            )
            of_epoch.append(values.mean())

            def norms(grad):
                first = grad[:norm_examples].reshape(-1, group_size, grad[0].size)
                return jnp.linalg.norm(first.mean(axis=1), axis=1)

            updates, state = tx.update(
                jax.tree.map(lambda grad: grad.mean(axis=0), grads),
                state,
                params,
                example_grad_norms=jax.tree.map(lambda grad: norms(grad).mean(), grads),
                example_grad_square_norms=jax.tree.map(
                    lambda grad: jnp.mean(norms(grad) ** 2), grads
                ),
            )
            params = optax.apply_updates(params, updates)
        losses.append(np.mean(of_epoch))
    logits = net.apply(
        {"params": params}, normalise(problem.test.images, fashion_mnist.DATASET), train=False
    )
    return losses, float(jnp.mean(logits.argmax(-1) == problem.test.labels))


DECAY = 0.1  # More than in the study, or it would not show.


def sgd(schedule):
    mask = clars_optax.default_mask
    return optax.chain(optax.add_decayed_weights(DECAY, mask), optax.sgd(schedule, 0.9))


def clars(schedule):
    return clars_optax.clars(schedule, weight_decay=DECAY)


def lena(schedule):
    """Of four groups of four, over four steps."""
    options = {"weight_decay_mask": clars_optax.default_mask, "batch_size": 16, "group_size": 4}
    return optimizers.lena(
        schedule, momentum=0.9, weight_decay=DECAY, num_steps=4, **options
    ).transformation


def variant(direction):
    """An optimizer from the new buffer and the direction of a layer with weights w."""

    def of_leaf(gradient, weights, norm, buffer):
        is_weight = weights.ndim > 1
        ratio = jnp.minimum(0.1, 0.01 * jnp.linalg.norm(weights) / (norm + 1e-6))
        decay = DECAY * weights if is_weight else 0.0
        return direction(gradient, decay, ratio if is_weight else 1.0, buffer)

    def make(schedule):
        def init(params):
            return 0, jax.tree.map(jnp.zeros_like, params)

        def update(grads, state, params, *, example_grad_norms, **_):
            step, buffers = state
            pairs = jax.tree.map(of_leaf, grads, params, example_grad_norms, buffers)
            buffers, updates = jax.tree.transpose(
                jax.tree.structure(params), jax.tree.structure((0, 0)), pairs
            )
            return jax.tree.map(lambda u: -schedule(step) * u, updates), (step + 1, buffers)

        return optax.GradientTransformationExtraArgs(init, update)

    return make


def inside(gradient, decay, ratio, buffer):
    buffer = 0.9 * buffer + ratio * (gradient + decay)
    return buffer, buffer


def outside(gradient, decay, ratio, buffer):
    buffer = 0.9 * buffer + gradient
    return buffer, ratio * buffer + decay


@pytest.mark.parametrize(
    ("name", "make", "norm_examples", "group_size"),
    [
        ("sgd, warm-up", sgd, None, 1),
        ("clars", clars, None, 1),
        ("clars, groups of 8", clars, None, 8),
        ("clars, 256 norms", clars, 10, 1),
        ("lena", lena, None, 4),
        ("clars, ratio inside momentum", variant(inside), None, 1),
        ("clars, decay outside", variant(outside), None, 1),
    ],
)
def test_training_is_that_of_the_definitions(
    problem, monkeypatch, name, make, norm_examples, group_size
):
    monkeypatch.setattr(programs, "augment", lambda pixels, key: pixels)
    net, run = Net(batch_norm=False), Run(0.5, 0.3, 3)
    options = {"num_norm_examples": norm_examples, "group_size": group_size}
    decayed = functools.partial(CONTENDERS[name].make, weight_decay=DECAY)
    (epochs,) = trained(net, problem, name, [run], make=decayed, **options)
    losses, test_accuracy = slow_epochs(net, problem, run, make, norm_examples, group_size)
    np.testing.assert_allclose([e.train_loss for e in epochs[1:]], losses, rtol=1e-4)
    assert epochs[-1].test_accuracy == pytest.approx(test_accuracy, abs=2.5 / 510)
    assert [e.step for e in epochs] == [0, 2, 4]


def test_run_that_diverges_ends_and_leaves_the_others_alone(problem):
    bad, good = Run(1e30, 0.0, 0), Run(0.1, 0.0, 0)
    net = Net(batch_norm=False)
    diverged, whole = trained(net, problem, "sgd", [bad, good])
    diverged_alone, whole_alone = trained(net, problem, "sgd", [bad], [good])
    assert [epoch.epoch for epoch in diverged] == [epoch.epoch for epoch in diverged_alone] == [0]
    np.testing.assert_allclose(whole, whole_alone, rtol=2e-4)


def test_augmented_images_are_moved_and_mirrored():
    pixels = np.random.default_rng(0).integers(1, 256, (500, 14, 14, 1), dtype=np.uint8)
    seen = set()
    for before, after in zip(pixels, np.asarray(augment(pixels, jax.random.key(0))), strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
        seen.update(
            (top, left, flip)
            for top, left, flip in itertools.product(range(5), range(5), (1, -1))
            if np.array_equal(padded[top : top + 14, left : left + 14][:, ::flip], after)
        )
    assert len(seen) == 50


def test_every_optimizer_has_the_same_tuning_budget():
    assert {len(contender.grid) for contender in CONTENDERS.values()} == {6}
    for name, contender in CONTENDERS.items():
        plain = CONTENDERS[name.removesuffix(", warm-up")]
        assert set(contender.learning_rates) <= set(plain.learning_rates)
        assert max(contender.learning_rates) == max(plain.learning_rates)


@pytest.mark.parametrize("study", PRESETS.values(), ids=PRESETS)
def test_presets_fit(study):
    for batch_size in study.batch_sizes:
        assert batch_size % study.microbatch_size == 0
        assert study.num_train % batch_size == 0
        for name in study.contenders:
            contender = CONTENDERS[name]
            assert study.microbatch_size % contender.group_size == 0
            num_steps = study.epochs * study.num_train // batch_size
            for rate, warmup in contender.grid:
                rates = contender.rates(rate, warmup, num_steps)
                assert max(rates) == pytest.approx(rate)
                assert (rates[0] < rate) == (warmup > 0)


def made_table():
    """Two optimizers with two rates, one of them better on the tuning seed, two seeds."""
    accuracies = {  # by optimizer, rate and seed: validation accuracies, then that of the test
        ("sgd", 0.1, 0): [0.1, 0.50, 0.55, 0.52],
        ("sgd", 0.2, 0): [0.1, 0.55, 0.65, 0.60],
        ("sgd", 0.2, 1): [0.1, 0.60, 0.65, 0.64],
        ("clars", 1.0, 0): [0.1, 0.61, 0.75, 0.70],
        ("clars", 1.0, 1): [0.1, 0.40, 0.70, 0.66],
        ("clars", 2.0, 0): [0.1, 0.62],
    }
    rows = []
    for (name, rate, seed), values in accuracies.items():
        for epoch, accuracy in enumerate(values[:3]):
            loss = np.nan if epoch == 0 else 2.0 / epoch + seed
            test = values[3] if epoch == 2 else np.nan
            run = ("net", 64, name, 0.0, rate, seed)
            rows.append((*run, epoch, 3 * epoch, loss, 1.0, accuracy, test))
    return pd.DataFrame(rows, columns=table.COLUMNS)


def test_summary_of_a_table_made_by_hand():
    results = summary.results(made_table()).set_index("optimizer")
    sgd, clars = results.loc["sgd"], results.loc["clars"]
    assert (sgd["learning_rate"], clars["learning_rate"]) == (0.2, 1.0)
    assert sgd[["mean", "low", "high", "seeds"]].tolist() == pytest.approx([0.62, 0.60, 0.64, 2])
    assert clars[["mean", "low", "high"]].tolist() == pytest.approx([0.68, 0.66, 0.70])
    assert (sgd["epochs_to_0.6"], clars["epochs_to_0.6"]) == (1.5, 1.5)
    assert (sgd["steps_to_0.6"], clars["steps_to_0.7"]) == (4.5, 6.0)
    assert np.isnan(sgd["steps_to_0.7"])
    assert (sgd["loss_1"], sgd["loss_2"]) == (2.5, 1.5)
    assert (sgd["diverged"], clars["diverged"]) == (0.0, 0.5)
    assert (sgd["close"], clars["close"]) == (0.5, 0.5)
    assert summary.effect(clars, sgd) == pytest.approx(0.06)
    assert summary.effect(clars, sgd.replace(0.64, 0.67)) == 0


def test_table_survives_writing(tmp_path):
    rows = made_table()
    table.append(tmp_path, rows[:4], "first")
    table.append(tmp_path, rows[4:8], "first")
    table.append(tmp_path, rows[8:], "second")
    pd.testing.assert_frame_equal(table.read(tmp_path), rows)
    assert table.remarks(tmp_path) == ["first", "second"]
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns a, b, but expected are network"):
        table.read(tmp_path)


@pytest.fixture(scope="module")
def digits_as_fashion_mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    splits = {"train": idx.enlarged_digits(700), "test": idx.enlarged_digits(200)}
    idx.write(folder / "fashion-mnist", splits)
    return folder


def test_command_trains_what_is_missing_and_reports(
    tmp_path, capsys, monkeypatch, digits_as_fashion_mnist
):
    # Its processes, too, compile fast.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    options = {"--data-dir": digits_as_fashion_mnist, "--output": tmp_path / "study"}
    arguments = ["--preset", "smoke", *map(str, itertools.chain(*options.items()))]
    main = functools.partial(convergence.main, arguments)
    main()
    rows = table.read(tmp_path / "study")
    assert len(summary.runs(rows)) == PRESETS["smoke"].num_runs == 14
    assert set(summary.results(rows)["seeds"]) == {2}
    (remark,) = table.remarks(tmp_path / "study")
    assert "--preset smoke" in remark
    assert jax.__version__ in remark
    text = (tmp_path / "study" / "report.md").read_text()
    assert "| clars, 256 norms |" in text
    assert len(list((tmp_path / "study").glob("*.png"))) == 3

    capsys.readouterr()
    main()
    assert "in 2 rows, of which 2 are there" in capsys.readouterr().err
    pd.testing.assert_frame_equal(table.read(tmp_path / "study"), rows)
    assert (tmp_path / "study" / "report.md").read_text() == text


def test_too_few_images_are_refused(digits_as_fashion_mnist):
    with pytest.raises(ValueError, match=r"needs 6,096 images .* hold 700 where 60,000"):
        load(PRESETS["cpu"], digits_as_fashion_mnist)


@pytest.mark.parametrize("preset", ["cpu", "cpu-ratio", "cpu-densenet", "cpu-clars"])
def test_committed_report_is_that_of_the_committed_table(tmp_path, preset):
    folder, study = RESULTS / f"convergence-{preset}", PRESETS[preset]
    rows = table.read(folder)
    assert len(summary.runs(rows)) == study.num_runs
    assert set(summary.results(rows)["seeds"]) == {len(study.seeds)}
    shutil.copy(folder / "runs.csv", tmp_path)
    report.write(tmp_path)
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}


def test_readme_shows_the_committed_results():
    results = pd.concat(
        summary.results(table.read(RESULTS / f"convergence-{preset}"))
        for preset in ("cpu", "cpu-ratio")
    ).set_index(["optimizer", "batch_size"])
    _, _, text = (RESULTS.parents[1] / "README.md").read_text().partition("| images per step |")
    rows = [line for line in text.splitlines()[2:] if line.startswith("| ")]
    assert len(rows) == 5
    for row in rows:
        name, *found = row.strip("| ").split(" | ")
        assert found == [
            "{:.1f} ({:.1f}-{:.1f})".format(
                *100 * results.loc[(name, batch_size), ["mean", "low", "high"]]
            )
            for batch_size in PRESETS["cpu"].batch_sizes
        ]


def test_the_conclusion_is_that_of_the_committed_results():
    parts = [
        summary.results(table.read(RESULTS / f"convergence-{preset}"))
        for preset in ("cpu", "cpu-ratio", "cpu-densenet")
    ]
    results = pd.concat(parts).set_index(["network", "batch_size", "optimizer"])
    cases = list(itertools.product(("resnet8_narrow", "densenet16_narrow"), (512, 2048, 4096)))
    text = (RESULTS.parent / "convergence" / "README.md").read_text()

    def cells(name, other=None):
        for case in cases:
            result = results.loc[(*case, name)]
            if other is None:
                yield f"{100 * result['mean']:.1f}"
            else:
                effect = summary.effect(result, results.loc[(*case, other)])
                yield f"{100 * effect:+.1f}" if effect else "none"

    for name in ("sgd", "clars", "clars, ratio x 10"):
        assert f"| {name} | {' | '.join(cells(name))} |" in text
    for title, name, other in (
        ("SGD, warm-up less without", "sgd, warm-up", "sgd"),
        ("clars less sgd", "clars", "sgd"),
        ("clars less sgd, warm-up", "clars", "sgd, warm-up"),
        ("clars less lars, warm-up", "clars", "lars, warm-up"),
        ("clars x 10 less clars", "clars, ratio x 10", "clars"),
        ("clars x 10 less sgd", "clars, ratio x 10", "sgd"),
        ("clars x 10 less sgd, warm-up", "clars, ratio x 10", "sgd, warm-up"),
        ("clars x 10 less lars, warm-up", "clars, ratio x 10", "lars, warm-up"),
        ("clars x 10 less lars x 10", "clars, ratio x 10", "lars, ratio x 10"),
    ):
        assert f"| *{title}* | {' | '.join(cells(name, other))} |" in text
