"""Optax's own way to per-example gradients, `micro_grad`, for losses that couple no examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import microbatching

import clars_optax
from tests.norms.models import MODELS, NUM_EXAMPLES

NAMES = [
    "batch_merged_with_time",
    "depthwise_convolution",
    "einsum_and_attention",
    "embedding_tied_with_the_output",
    "grouped_convolution",
    "norms_and_standardised_kernels",
    "shared_weights_and_l2",
]


@pytest.mark.parametrize(
    ("name", "microbatch_size"), [*((name, None) for name in NAMES), ("shared_weights_and_l2", 2)]
)
def test_matches_micro_grad(name, microbatch_size):
    model = MODELS[name]()
    micro_grad = microbatching.micro_grad(
        model.loss,
        microbatch_size=microbatch_size,
        accumulator=microbatching.AccumulationType.MEAN,
        metrics_fn=lambda grads: jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, grads)),
    )
    step = clars_optax.value_and_grad_and_norms(model.loss, microbatch_size=microbatch_size)
    (grads, aux), (value, found_grads, norms) = jax.jit(
        lambda *args: (micro_grad(*args), step(*args))
    )(model.params, model.batch)
    np.testing.assert_allclose(value, aux.values.mean(), rtol=1e-6)
    trees = [jax.tree.leaves(tree) for tree in (norms, aux.metrics, found_grads, grads)]
    for norm, wanted, grad, wanted_grad in zip(*trees, strict=True):
        assert norm.shape == wanted.shape == (NUM_EXAMPLES,)
        bound = 1e-5 * jnp.max(wanted)
        assert jnp.max(jnp.abs(norm - wanted)) <= bound
        assert jnp.max(jnp.abs(grad - wanted_grad)) <= bound
