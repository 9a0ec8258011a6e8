import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import leaves
from benchmarks.models import MODELS, make_problem
from benchmarks.timing import Compiled
from benchmarks.vit import ViT

pytestmark = pytest.mark.usefixtures("compiled_fast")


class Net(nn.Module):
    """Two convolutions alike, and one that is not, before a dense layer."""

    @nn.compact
    def __call__(self, x):
        for width in (3, 3, 2):
            x = nn.tanh(nn.Conv(width, (3, 3), use_bias=False)(x))
        return nn.Dense(4)(x.reshape(len(x), -1))


@pytest.fixture
def problem(monkeypatch):
    problem = make_problem(Net(), (4, 4, 3), batch_size=6, num_classes=4)
    monkeypatch.setitem(MODELS, "mlp", lambda: problem)
    return problem


def rows_of(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_table(problem, capsys):
    leaves.main(["--models", "mlp", "--rounds", "2"])

    text = capsys.readouterr().out
    header, _, *rows = rows_of(text)
    assert header[:4] == ["leaf", "such leaves", "shape", "gradient"]
    assert set(header[4:]) == {"Direct", "Gram", "Pixel-Gram", "Split 0", "Split 1"}
    kinds = {row[0]: row[1:3] for row in rows}
    assert kinds["['Conv_0']['kernel']"] == ["2", "3x3x3x3"]
    assert kinds["['Conv_2']['kernel']"] == ["1", "3x3x3x2"]
    assert kinds["['Dense_0']['kernel']"] == ["1", "32x4"]
    for row in rows:
        (chosen,) = [cell for cell in row if cell.startswith("**")]
        assert float(chosen.strip("*")) >= 0
    gradient, chosen, fastest = map(float, re.findall(r"([\d.]+) (?:ms|by)", text)[-3:])
    assert fastest <= chosen
    assert gradient > 0
    assert "0 leaves have no rule" in text


@pytest.mark.usefixtures("problem")
def test_some_leaves_of_a_network(capsys):
    leaves.main(["--models", "mlp", "--leaves", "Dense", "Conv_2", "--rounds", "1"])

    rows = rows_of(capsys.readouterr().out)[2:]
    assert {row[0].split("'")[1] for row in rows} == {"Conv_2", "Dense_0"}


@pytest.mark.usefixtures("problem")
def test_leaves_that_are_not_there_are_refused():
    with pytest.raises(SystemExit, match=r"--leaves must be part of a path, got Conv_9; .*Conv_0"):
        leaves.main(["--models", "mlp", "--leaves", "Conv_9"])


def test_all_ways_are_the_engine_s_and_agree(problem):
    found = {leaf.path: leaf for leaf in leaves.leaves_of(problem)}
    leaf = found["['Conv_2']['kernel']"]
    arguments, cotangent = leaf.arrays()

    def of_example(image, cotangent):
        def convolution(kernel):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                image[None], kernel, (1, 1), "SAME", dimension_numbers=numbers
            )

        return jax.vjp(convolution, arguments[1])[1](cotangent[None])[0]

    grads = jax.vmap(of_example)(arguments[0], cotangent)
    names = [way.name for way in leaf.ways(arguments, cotangent)]
    assert len(names) == len(set(names)) == 5
    for name in names:
        squares, gradient = leaf.squares_and_gradient(name, arguments, cotangent)
        expected = 36 * jnp.sum(jnp.square(grads), axis=(1, 2, 3, 4))
        np.testing.assert_allclose(squares, expected, rtol=1e-4)
        np.testing.assert_allclose(gradient, grads.sum(0), rtol=1e-4, atol=1e-4)


def test_leaves_of_a_loop_are_found():
    model = ViT(num_classes=3, patch_size=2, width=4, depth=2, num_heads=2, scan=True)
    problem = make_problem(model, (4, 4, 3), batch_size=2, num_classes=3)

    paths = [leaf.path for leaf in leaves.leaves_of(problem)]

    assert "['blocks']['block']['mlp1']['kernel']" in paths
    assert len(paths) == len(set(paths)) == len(jax.tree.leaves(problem.params)) - 1


@pytest.mark.parametrize(
    ("error", "cell"),
    [(RuntimeError("RESOURCE_EXHAUSTED: 1 TB"), "out of memory"), (OSError(), "OSError")],
)
def test_a_way_that_fails_says_so(problem, monkeypatch, error, cell):
    compiled_of = Compiled.of

    def of(function, args):
        if getattr(function, "args", ()) == ("Gram",):
            raise error
        return compiled_of(function, args)

    monkeypatch.setattr(Compiled, "of", of)
    leaf = next(leaf for leaf in leaves.leaves_of(problem) if "Conv_0" in leaf.path)

    measured = leaves.measure(leaf, 1)

    assert measured.ways["Gram"] == cell
    assert measured.prices["Direct"] > 0


@pytest.mark.tpu
@pytest.mark.usefixtures("problem")
def test_table_for_a_tpu(capsys):
    leaves.main(["--models", "mlp", "--device", "v5e"])

    text = capsys.readouterr().out
    assert "compiled for TPU v5 lite, million cycles" in text
    for row in rows_of(text)[2:]:
        (chosen,) = [cell for cell in row if cell.startswith("**")]
        assert float(chosen.strip("*")) >= 0
    assert len(re.findall(r"\d million cycles", text)) == 3
