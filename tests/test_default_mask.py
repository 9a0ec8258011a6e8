"""`default_mask` on the parameter trees of the JAX libraries."""

from typing import NamedTuple

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import strategies as st

import clars_optax

ONES = np.ones


def test_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), name="conv")(x)
            x = nn.BatchNorm(use_running_average=False, name="bn")(x)
            x = nn.MultiHeadDotProductAttention(2, qkv_features=4, name="attention")(x)
            return nn.Dense(1, name="head")(x)

    params = Net().init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))["params"]
    projection = {"kernel": True, "bias": False}  # the biases are of shape [heads, features]
    expected = {
        "conv": {"kernel": True, "bias": False},
        "bn": {"scale": False, "bias": False},
        "attention": dict.fromkeys(("query", "key", "value", "out"), projection),
        "head": {"kernel": False, "bias": False},  # [4, 1]: only one axis is longer than 1
    }
    assert clars_optax.default_mask(params) == expected
    assert clars_optax.default_mask(freeze(params)) == freeze(expected)


def test_linen_partitioned_parameters_are_named_by_what_the_box_is_called():
    init = nn.with_partitioning(nn.initializers.ones, ("a", "b"))
    params = {"kernel": init(None, (3, 4)), "bias": init(None, (3, 4))}
    mask = clars_optax.default_mask(params)
    assert jax.tree.leaves(mask) == [False, True]


@pytest.mark.parametrize("pure", [False, True])
def test_nnx(pure):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs)])
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    mask = clars_optax.default_mask(nnx.as_pure(params) if pure else params)
    assert jax.tree.structure(mask) == jax.tree.structure(nnx.as_pure(params) if pure else params)
    mask = nnx.to_pure_dict(nnx.as_pure(mask))
    assert mask["conv"] == {"kernel": True, "bias": False}
    assert mask["bn"] == {"scale": False, "bias": False}
    assert mask["blocks"] == {0: {"kernel": True, "bias": False}}
    assert mask["attention"]["value"] == {"kernel": True, "bias": False}


def test_haiku_batch_norm_has_four_axes():
    params = {
        "net/conv2_d": {"w": ONES((3, 3, 3, 8)), "b": ONES((8,))},
        "net/batch_norm": {"scale": ONES((1, 1, 1, 8)), "offset": ONES((1, 1, 1, 8))},
        "net/layer_norm": {"scale": ONES((4, 8)), "offset": ONES((4, 8))},
    }
    assert clars_optax.default_mask(params) == {
        "net/conv2_d": {"w": True, "b": False},
        "net/batch_norm": {"scale": False, "offset": False},
        "net/layer_norm": {"scale": False, "offset": False},
    }


class Conv(NamedTuple):
    weight: object
    bias: object


def test_attribute_keys_and_sequences_as_in_equinox():
    params = [Conv(ONES((8, 3, 3, 3)), ONES((8, 1, 1))), (Conv(ONES((8, 2)), ONES((8, 2))), None)]
    assert clars_optax.default_mask(params) == [Conv(True, False), (Conv(True, False), None)]


def test_a_leaf_named_value_is_a_leaf():
    assert clars_optax.default_mask({"bias": {"value": ONES((3, 4))}}) == {"bias": {"value": True}}


def test_masked_nodes_stay():
    params = {"a": optax.MaskedNode(), "b": [ONES((2, 2))]}
    assert clars_optax.default_mask(params) == {"a": optax.MaskedNode(), "b": [True]}


def test_a_bare_array():
    assert clars_optax.default_mask(ONES((2, 2))) is True
    assert clars_optax.default_mask(jnp.float32(1.0)) is False


@hypothesis.given(st.lists(st.integers(1, 3), max_size=5), st.sampled_from(["kernel", "scale"]))
def test_counts_the_axes_longer_than_one(shape, name):
    expected = name == "kernel" and len([size for size in shape if size > 1]) >= 2
    assert clars_optax.default_mask({name: np.empty(shape)}) == {name: expected}


@pytest.mark.parametrize("count", [7, np.int64(7), jnp.int32(7)])
def test_refuses_a_step_count(count):
    message = r'step count, 7: .*static_args=\("weight_decay_mask", "trust_ratio_mask"\)'
    with pytest.raises(ValueError, match=message):
        clars_optax.default_mask(count)


def test_refuses_a_traced_step_count():
    with pytest.raises(ValueError, match="step count"):
        jax.jit(clars_optax.default_mask)(3)
