"""The price of per-example norms in JAX with this library, and in PyTorch with Opacus.

`python -m benchmarks.against_opacus` prints one table; `benchmarks/README.md` says what is in it.
"""

import argparse
import functools
import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import Problem, make_problem
from benchmarks.report import machine, table
from benchmarks.timing import Compiled, time_pairs
from benchmarks.variants import VARIANTS, plain

_NORM_GROUPS = 8
_EPSILON = 1e-5  # PyTorch's


class Shape(NamedTuple):
    """A residual network with GroupNorm, for Opacus refuses BatchNorm, and its batch.

    Attributes:
        blocks: residual blocks of each stage, of two 3x3 convolutions.
        width: channels of the first stage; every further one has twice as many.
        image_size: height and width.
        batch_size: number of examples.
        num_classes: number of logits.
    """

    blocks: tuple[int, ...]
    width: int
    image_size: int
    batch_size: int
    num_classes: int = 10


PRESETS = {
    "cpu": Shape((2, 2, 2, 2), width=32, image_size=32, batch_size=32),
    "gpu": Shape((3, 4, 6, 3), width=64, image_size=64, batch_size=256),
}


class Block(nn.Module):
    """Two convolutions beside a shortcut, in JAX."""

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, width]."""
        conv = functools.partial(nn.Conv, self.width, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.GroupNorm, _NORM_GROUPS, epsilon=_EPSILON, dtype=self.dtype)
        y = nn.relu(norm()(conv((3, 3), strides=self.stride, padding=1)(x)))
        y = norm()(conv((3, 3), padding=1)(y))
        if self.stride > 1 or x.shape[-1] != self.width:
            x = norm()(conv((1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class Network(nn.Module):
    """The network in JAX."""

    shape: Shape
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, 3] to logits."""
        x = nn.Conv(self.shape.width, (3, 3), padding=1, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(nn.GroupNorm(_NORM_GROUPS, epsilon=_EPSILON, dtype=self.dtype)(x))
        for stage, number in enumerate(self.shape.blocks):
            for block in range(number):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(self.shape.width * 2**stage, stride, self.dtype)(x)
        return nn.Dense(self.shape.num_classes, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))


def torch_network(shape: Shape) -> Any:
    """The network in PyTorch."""
    from torch import nn as tnn

    class TorchBlock(tnn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            conv = functools.partial(tnn.Conv2d, bias=False)
            norm = functools.partial(tnn.GroupNorm, _NORM_GROUPS, width)
            self.residual = tnn.Sequential(
                *(conv(inputs, width, 3, stride=stride, padding=1), norm(), tnn.ReLU()),
                *(conv(width, width, 3, padding=1), norm()),
            )
            self.shortcut: Any = tnn.Identity()
            if stride > 1 or inputs != width:
                self.shortcut = tnn.Sequential(conv(inputs, width, 1, stride=stride), norm())
            self.relu = tnn.ReLU()

        def forward(self, x: Any) -> Any:
            return self.relu(self.shortcut(x) + self.residual(x))

    width = shape.width
    layers = [tnn.Conv2d(3, width, 3, padding=1, bias=False), tnn.GroupNorm(_NORM_GROUPS, width)]
    layers.append(tnn.ReLU())
    inputs = width
    for stage, number in enumerate(shape.blocks):
        for block in range(number):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(TorchBlock(inputs, width * 2**stage, stride))
            inputs = width * 2**stage
    return tnn.Sequential(
        *layers, tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(inputs, shape.num_classes)
    )


def jax_problem(shape: Shape) -> Problem:
    """The loss in JAX; in bfloat16 where there is an accelerator."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    size = (shape.image_size, shape.image_size, 3)
    return make_problem(
        Network(shape, dtype), size, shape.batch_size, num_classes=shape.num_classes, dtype=dtype
    )


def torch_runs(shape: Shape) -> dict[str, Callable[[], float]]:
    """Functions that compute the gradient in PyTorch, and with Opacus its norms, once.

    Returns:
        By "plain" and by Opacus's names for its ways, functions that return the seconds.
    """
    import torch
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = (shape.batch_size, 3, shape.image_size, shape.image_size)
    # Not in the layout channels_last: Opacus 1.6.0 reads convolutions' inputs wrongly there.
    images = torch.randn(size, device=device, dtype=dtype)
    labels = torch.randint(0, shape.num_classes, (shape.batch_size,), device=device)

    def run(model: Any, norms_of: Callable[[Any], Any]) -> float:
        for parameter in model.parameters():
            parameter.grad = parameter.grad_sample = None
        start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        norms = [norms_of(parameter) for parameter in model.parameters()]
        if device == "cuda":
            torch.cuda.synchronize()
        del norms
        return time.perf_counter() - start

    def network() -> Any:
        return torch_network(shape).to(device, dtype)

    def of_rows(parameter: Any) -> Any:
        return parameter.grad_sample.flatten(1).float().norm(dim=1)

    ghost = GradSampleModuleFastGradientClipping(network(), max_grad_norm=1.0)
    return {
        "plain": functools.partial(run, network(), lambda _: None),
        "grad_sample": functools.partial(run, GradSampleModule(network()), of_rows),
        "ghost": functools.partial(run, ghost, lambda parameter: parameter._norm_sample),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    versions = _versions()
    # Two libraries share the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    shape = PRESETS[options.preset]
    problem = jax_problem(shape)
    ours = {
        name: functools.partial(Compiled.of(make(problem), problem.args).run, problem.args)
        for name, make in {"plain": plain, "exact": VARIANTS["exact"]}.items()
    }
    lines = []
    with warnings.catch_warnings():
        # What Opacus warns of (backward hooks that are to change) is its own.
        warnings.simplefilter("ignore")
        for library, runs in (("JAX", ours), ("PyTorch", torch_runs(shape))):
            for name, run in itertools.islice(runs.items(), 1, None):
                print(f"{library}: {name} ...", end=" ", file=sys.stderr, flush=True)
                pairs = time_pairs(runs["plain"], run, options.pairs)
                print(f"{pairs.ratio:.2f}", file=sys.stderr, flush=True)
                low, high = pairs.interval
                times = [f"{1e3 * float(np.median(s)):.1f} ms" for s in (pairs.base, pairs.other)]
                lines.append((library, name, *times, f"{pairs.ratio:.2f}", f"{low:.2f}-{high:.2f}"))
    print(f"{machine()}; {versions}; {shape}; medians of {options.pairs} pairs\n")
    print(table(("library", "norms", "plain", "with norms", "time", "5-95 %"), lines))


def _versions() -> str:
    try:
        import opacus
        import torch
    except ImportError as error:
        raise SystemExit(
            f"benchmarks.against_opacus needs PyTorch and Opacus ({error}): "
            "pip install -e '.[train,torch]'"
        ) from error
    return f"PyTorch {torch.__version__}, Opacus {opacus.__version__}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_opacus",
        description="Cost of per-example norms here and in Opacus; needs the extra torch.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="default: cpu")
    parser.add_argument("--pairs", type=int, default=20, help="runs of each; default: 20")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
