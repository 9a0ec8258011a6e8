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

# How far norms may be apart: of the float32 sums of what was rounded to the dtype.
TOLERANCES = {jnp.float32: 1e-4, jnp.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _on_a_gpu():
    kernels = platform().kernels
    assert kernels == "compiled", (
        f"needs one GPU, got {jax.devices()}, on which kernels are {kernels}"
    )


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


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("resnet50", ["weight_gradient_and_norms"]),
        ("mobilenet_v2", ["weight_gradient_and_norms", "depthwise_gradients"]),
        ("vit", ["weight_gradient_and_norms"]),
    ],
)
def test_norms_and_gradients_are_those_of_the_generic_way_and_the_same_each_time(
    name, kernels, dtype
):
    problem = network(name, dtype)
    with jax.default_matmul_precision("highest"):
        lowered = norms_of(problem)
        generic = norms_of(problem, method="generic").compile()
    assert all(kernel in lowered.as_text() for kernel in kernels)
    compiled = lowered.compile()

    found = compiled(*problem.args)

    for one, other in zip(*map(jax.tree.leaves, (found, compiled(*problem.args))), strict=True):
        np.testing.assert_array_equal(one, other)
    _, _, expected = generic(*problem.args)
    jax.tree.map_with_path(
        lambda path, x, y: np.testing.assert_allclose(
            x, y, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * y.max(), err_msg=str(path)
        ),
        found[2],
        expected,
    )


@pytest.mark.parametrize(
    "options", [{"group_size": 4}, {"num_norm_examples": 4}, {"microbatch_size": 4}]
)
def test_groups_parts_and_microbatches(options):
    problem = network("resnet50", jnp.float32)
    with jax.default_matmul_precision("highest"):
        found = norms_of(problem, **options).compile()(*problem.args)
        expected = norms_of(problem, method="generic", **options).compile()(*problem.args)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), found[2], expected[2])
