import re
import sys

import jax
import numpy as np
import pytest

from benchmarks import against_opacus
from benchmarks.variants import VARIANTS

TINY = against_opacus.Shape((1, 1), width=8, image_size=8, batch_size=4)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(against_opacus.PRESETS, "cpu", TINY)


@pytest.mark.usefixtures("tiny")
def test_without_opacus_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)

    with pytest.raises(SystemExit, match=r"pip install -e '.\[train,torch\]'"):
        against_opacus.main([])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("tiny")
def test_table(capsys):
    against_opacus.main(["--pairs", "2"])

    text = capsys.readouterr().out
    rows = re.findall(r"^\| (JAX|PyTorch) +\| (\w+) +\|", text, re.MULTILINE)
    assert rows == [("JAX", "exact"), ("PyTorch", "grad_sample"), ("PyTorch", "ghost")]
    assert "Opacus" in text


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_both_libraries_find_the_same_norms():
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    problem = against_opacus.jax_problem(TINY)
    network = against_opacus.torch_network(TINY)
    images, labels = map(np.asarray, problem.batch)
    ours = list(leaves_in_order(problem.params))
    with torch.no_grad():
        for parameter, leaf in zip(network.parameters(), ours, strict=True):
            parameter.copy_(torch.from_numpy(as_in_torch(leaf)))
    module = GradSampleModuleFastGradientClipping(network, max_grad_norm=1.0)
    logits = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long())
    loss.backward()

    value, grads, norms = jax.jit(VARIANTS["exact"](problem))(*problem.args)

    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    for parameter, grad, norm in zip(
        network.parameters(), leaves_in_order(grads), leaves_in_order(norms), strict=True
    ):
        np.testing.assert_allclose(parameter.grad, as_in_torch(grad), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(parameter._norm_sample, norm, rtol=1e-3)


def leaves_in_order(params):
    """The leaves in the order in which the network uses them, as PyTorch has them."""
    yield params["Conv_0"]["kernel"]
    yield from of_norm(params["GroupNorm_0"])
    for block in (params[f"Block_{i}"] for i in range(len(TINY.blocks))):
        for i in range(len(block) // 2):
            yield block[f"Conv_{i}"]["kernel"]
            yield from of_norm(block[f"GroupNorm_{i}"])
    yield from (params["Dense_0"]["kernel"], params["Dense_0"]["bias"])


def of_norm(params):
    return params["scale"], params["bias"]


def as_in_torch(leaf):
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
    return np.array(np.transpose(leaf, order))
