import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.vit import ViT

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.mark.parametrize(
    ("width", "num_heads", "count"), [(192, 3, 5_717_416), (384, 6, 22_050_664)]
)
def test_number_of_parameters(width, num_heads, count):
    """Those of timm's vit_tiny_patch16_224 and vit_small_patch16_224."""
    model = ViT(1000, patch_size=16, width=width, depth=12, num_heads=num_heads)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_scanned_blocks_are_the_same_network():
    model = ViT(5, patch_size=4, width=8, depth=3, num_heads=2)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    blocks = [params.pop(f"block{i + 1}") for i in range(3)]
    stacked = {"block": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}

    scanned = model.clone(scan=True).apply({"params": {**params, "blocks": stacked}}, images)

    named = {f"block{i + 1}": block for i, block in enumerate(blocks)}
    expected = model.apply({"params": {**params, **named}}, images)
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-6)
