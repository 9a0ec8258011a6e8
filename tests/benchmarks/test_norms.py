import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import norms, timing
from benchmarks.models import MLP, MODELS, PRESETS, make_problem
from benchmarks.timing import Compiled, Pairs, time_pairs
from benchmarks.variants import VARIANTS, plain

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def problem():
    return make_problem(MLP((5, 3)), (4,), batch_size=16, num_classes=3)


@pytest.fixture(scope="module")
def tiny(problem):
    """Replaces the perceptron on the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "mlp", lambda: problem)
        yield


def table(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.usefixtures("tiny")
def test_table_and_numbers(capsys, tmp_path):
    norms.main(["--models", "mlp", "--pairs", "2", "--output", str(tmp_path)])
    text = capsys.readouterr().out

    header, _, base, *rows = table(text)
    assert header == ["model", "variant", "time", "5-95 %", "memory", "FLOPs", "trace + compile"]
    assert base[:2] == ["**mlp**, N=16", "plain"]
    assert [row[1] for row in rows] == ["A/A", *VARIANTS]
    for row in rows:
        assert float(row[2]) > 0
    assert rows[0][4:6] == ["1.00", "1.00"]
    assert jax.__version__ in text
    assert (tmp_path / "norms.md").read_text() == text
    (model,) = json.loads((tmp_path / "norms.json").read_text())["models"]
    assert model["plain"]["temp_bytes"] > 0
    for variant in model["variants"]:
        assert len(variant["seconds"]) == len(variant["plain_seconds"]) == 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("error", "cell"),
    [
        (NotImplementedError("a scan"), "refused"),
        (RuntimeError("RESOURCE_EXHAUSTED: 1 TB"), "out of memory"),
        (ZeroDivisionError("oh"), "ZeroDivisionError"),
    ],
)
def test_a_variant_that_fails_leaves_the_rest_of_the_table(
    error, cell, monkeypatch, capsys, tmp_path
):
    def fail(problem):
        raise error

    monkeypatch.setitem(VARIANTS, "exact", fail)
    arguments = ["--models", "mlp", "--variants", "exact", "vmap", "--pairs", "1"]
    norms.main([*arguments, "--output", str(tmp_path)])

    *_, failed, last = table(capsys.readouterr().out)
    assert failed[1:] == ["exact", cell, "", "", "", ""]
    assert float(last[2]) > 0
    (model,) = json.loads((tmp_path / "norms.json").read_text())["models"]
    assert model["variants"][1]["message"] == str(error)


@pytest.mark.usefixtures("tiny")
def test_what_needs_more_memory_than_there_is_does_not_run(monkeypatch, capsys):
    monkeypatch.setattr(timing, "_physical_memory", lambda: 0)

    norms.main(["--models", "mlp", "--variants", "exact", "--pairs", "1"])

    *_, exact = table(capsys.readouterr().out)
    assert exact[2] == "out of memory"
    assert float(exact[4]) > 0


@pytest.mark.parametrize(
    "arguments", [["--models", "none"], ["--pairs", "0"], ["--batch-size", "24"]]
)
def test_refuses_wrong_options(arguments):
    with pytest.raises(SystemExit, match="2"):
        norms.main(arguments)


def test_presets_name_models():
    assert {name for preset in PRESETS.values() for name in preset} == set(MODELS)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_compute_the_same(name, problem):
    value, grads = jax.jit(plain(problem))(*problem.args)
    _, _, per_example = jax.jit(VARIANTS["exact"](problem))(*problem.args)

    result = jax.jit(VARIANTS[name](problem))(*problem.args)

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    close(result[0], value)
    jax.tree.map(close, result[1], grads)
    if name == "group_size=8":
        assert {leaf.shape for leaf in jax.tree.leaves(result[2])} == {(2,)}
    elif name != "plain,N/4":
        jax.tree.map(lambda x, y: close(x, y[: len(x)]), result[2], per_example)


def test_median_and_its_interval():
    pairs = Pairs(base=[1.0, 2.0, 4.0, 1.0], other=[2.0, 4.0, 8.0, 100.0])

    assert pairs.ratio == 2
    assert pairs.interval[0] == 2
    assert 2 <= pairs.interval[1] <= 100


def test_the_order_in_a_pair_alternates():
    calls = []
    functions = [
        Compiled(lambda name=name: calls.append(name) or jnp.zeros(()), 0, 0, 0, 0)
        for name in ("base", "other")
    ]

    pairs = time_pairs(*(lambda f=f: f.run(()) for f in functions), 2)

    assert calls == ["base", "other", "base", "other", "other", "base"]  # The first two to warm up.
    assert len(pairs.base) == len(pairs.other) == 2
