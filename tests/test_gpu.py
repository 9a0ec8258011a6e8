"""On a GPU, which it needs: `python -m pytest -m gpu -n 0`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clars_optax
from benchmarks.models import make_problem
from benchmarks.vit import ViT
from clars_optax.norms._rules import platform
from train.models import MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

# How far norms may be apart, of themselves and of the largest there are: attention does not depend
# on the biases of its keys, so that their norms are nothing but rounding.
TOLERANCES = {jnp.float32: (1e-3, 1e-6), jnp.bfloat16: (5e-2, 1e-3)}


@pytest.fixture(autouse=True)
def _on_a_gpu():
    kernels = platform().kernels
    assert kernels == "gpu", f"needs one GPU, got {jax.devices()}, on which kernels are {kernels}"


def network(name, dtype):
    if name == "vit":
        model = ViT(10, patch_size=8, width=96, depth=2, num_heads=3, dtype=dtype)
        return make_problem(model, (32, 32, 3), 8, dtype=dtype)
    model = MODELS[name](num_classes=10, dtype=dtype)
    return make_problem(model, (64, 64, 3), 8, dtype=dtype, train=True)


def norms_of(problem, **options):
    """A function of its arguments; a kernel that fails its trial would warn, which is an error."""
    step = clars_optax.value_and_grad_and_norms(
        problem.loss_fn, batch_argnums=problem.batch_argnums, **options
    )
    return jax.jit(step).lower(*problem.args)


def compare(problem, dtype, **options):
    """Compiles the norms by the kernels; returns what it made of them, once they are right."""
    with jax.default_matmul_precision("highest"):
        lowered = norms_of(problem, **options)
        generic = norms_of(problem, method="generic", **options).compile()
    compiled = lowered.compile()
    (_, _, found), (_, _, expected) = compiled(*problem.args), generic(*problem.args)
    relative, absolute = TOLERANCES[dtype]
    absolute *= max(norms.max() for norms in jax.tree.leaves(expected))
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, relative, absolute, err_msg=str(path))
    return lowered.as_text(), compiled


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("resnet50", ["weight_gradient_and_norms"]),
        ("mobilenet_v2", ["weight_gradient_and_norms", "depthwise_gradients"]),
        ("vit", ["weight_gradient_and_norms"]),
    ],
)
def test_norms_are_those_of_the_generic_way(name, kernels, dtype):
    text, _ = compare(network(name, dtype), dtype)
    assert all(kernel in text for kernel in kernels)


def test_the_same_input_gives_the_same_bits():
    """Of a network whose gradients take no convolution of cuDNN's, which may add in any order."""
    problem = network("vit", jnp.bfloat16)
    _, compiled = compare(problem, jnp.bfloat16)
    first, *others = (compiled(*problem.args) for _ in range(5))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.parametrize(
    "options", [{"group_size": 4}, {"num_norm_examples": 4}, {"microbatch_size": 4}]
)
def test_groups_parts_and_microbatches(options):
    compare(network("resnet50", jnp.float32), jnp.float32, **options)
