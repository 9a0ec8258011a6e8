"""Vision transformers: Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021).

With a class token, a learned table of positions, normalisation before each sublayer, and a GELU
perceptron of four times the width. Dropout is left out.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Block(nn.Module):
    """Attention and a perceptron, each behind a normalisation and beside a shortcut.

    Attributes:
        num_heads: heads of the attention.
        dtype: of the computation; None for that of the input.
    """

    num_heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [N, T, d] to [N, T, d]."""
        width = x.shape[-1]
        y = nn.LayerNorm(dtype=self.dtype, name="norm1")(x)
        x += nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype, name="attention")(y)
        y = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="mlp1")(y))
        return x + nn.Dense(width, dtype=self.dtype, name="mlp2")(y)


class ViT(nn.Module):
    """A vision transformer.

    Attributes:
        num_classes: number of logits.
        patch_size: side of a patch in pixels.
        width: channels of a token.
        depth: number of blocks.
        num_heads: heads of the attention.
        scan: whether the blocks are one block, scanned over stacked parameters and checkpointed, so
            that compilation time and memory do not grow with the depth.
        dtype: of the computation, as opposed to the parameters; None for that of the images.
    """

    num_classes: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    scan: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [N, H, W, C] to logits [N, num_classes]."""
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.width, patch, strides=patch, dtype=self.dtype, name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        init = nn.initializers.normal(stddev=0.02)
        x += self.param("positions", init, (1, *x.shape[1:])).astype(x.dtype)
        if self.scan:
            scanned = nn.scan(
                _Step,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = scanned(self.num_heads, self.dtype, name="blocks")(x, None)
        else:
            for index in range(self.depth):
                x = Block(self.num_heads, self.dtype, name=f"block{index + 1}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="head_norm")(x[:, 0])
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


class _Step(nn.Module):
    """A checkpointed block with the signature of a scan's body."""

    num_heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        # The scan itself keeps the compiler from undoing the checkpoint.
        block = nn.remat(Block, prevent_cse=False)
        return block(self.num_heads, self.dtype, name="block")(x), None
