"""Where the price of the norms comes from: every way to them, for every leaf that a rule has.

Timed, or as the compiler for a device that is not there sees it. `python -m benchmarks.leaves`
prints one table; `benchmarks/README.md` says what is in it.
"""

import argparse
import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import MODELS, PRESETS, Problem, problem_of
from benchmarks.report import machine, table
from benchmarks.targets import TARGETS, Target, plan_of
from benchmarks.timing import Compiled
from clars_optax.norms._rows import Rows
from clars_optax.norms._rules import Rule, Way, cheapest, cost, platform
from clars_optax.norms._trace import make_plan
from clars_optax.norms._trials import claims_of
from clars_optax.norms._use import Use

_Found = TypeVar("_Found")

# A way that is said to be so many times dearer than another is not worth its compilation.
_HOPELESS = 30

_MILLISECONDS = "ms"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter with a rule.

    Attributes:
        path: its place among the parameters.
        use: the operation in which it meets the batch.
        rule: of that operation.
        rows: what the norms are of.
    """

    path: str
    use: Use
    rule: Rule
    rows: Rows

    @property
    def key(self) -> Any:
        """The same for leaves of which one stands for all."""
        operation = self.use.operation
        operands = [(value.shape, value.aval.dtype) for value in operation.operands]
        return operation.name, str(operation.params), str(operands)

    @property
    def is_image(self) -> bool:
        """Whether it meets images: of a convolution."""
        return self.use.operation.name == "conv_general_dilated"

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parameter where it meets the batch."""
        (parameter,) = self.use.shadowed
        return self.use.operation.arguments[parameter].shape

    def arrays(self) -> tuple[list[jax.Array], jax.Array]:
        """Draws arguments and cotangent."""
        rng = np.random.default_rng(0)

        def draw(of: jax.ShapeDtypeStruct) -> jax.Array:
            if jnp.issubdtype(of.dtype, jnp.floating):
                return jnp.asarray(rng.standard_normal(of.shape, np.float32), of.dtype)
            return jnp.zeros(of.shape, of.dtype)

        arguments, cotangent = self.use.types
        return [draw(of) for of in arguments], draw(cotangent)

    def ways(self, arguments: Sequence[jax.Array], cotangent: jax.Array) -> list[Way]:
        """The ways that the engine chooses from."""
        return self.use.ways(self.rule, arguments, cotangent, self.rows, platform())

    def gradient(self, arguments: Sequence[jax.Array], cotangent: jax.Array) -> jax.Array:
        """The weight gradient alone."""
        return self.use.pull(arguments, [cotangent], self.use.shadowed)[0]

    def squares_and_gradient(
        self, name: str, arguments: Sequence[jax.Array], cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The squared norms by the way of a name, and the weight gradient."""
        (way,) = (way for way in self.ways(arguments, cotangent) if way.name == name)
        squares, gradient = way.run()
        if gradient is None:
            gradient = self.gradient(arguments, cotangent)
        return squares, gradient


def leaves_of(problem: Problem) -> Iterator[Leaf]:
    """Finds the parameters for which there are rules, those inside of nested programs too."""
    with_paths, treedef = jax.tree.flatten_with_path(problem.params)
    paths = [jax.tree_util.keystr(path) for path, _ in with_paths]
    params = [param for _, param in with_paths]
    rows = Rows(problem.batch_size, 1, problem.batch_size, is_mean=True)

    def loss_fn(params: Sequence[Any], batch: Sequence[Any]) -> tuple[Any, list[Any]]:
        return problem.loss_fn(jax.tree.unflatten(treedef, params), *batch), []

    plan = make_plan(loss_fn, params, paths, problem.batch, with_rules=True)
    for inner, operation in claims_of(plan):
        claim = inner.claims[operation]
        path = ", ".join(sorted(inner.roots[claim.param]))
        yield Leaf(path, inner.use(operation), claim.rule, rows)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the ways to the norms of a leaf cost.

    Attributes:
        chosen: the way that the engine takes.
        gradient: the price of the weight gradient alone: seconds, median over the rounds, or what
            the compiler says of it.
        ways: by name, the price of each way to the norms and the weight gradient; or in a word or
            two why there is none.
    """

    chosen: str
    gradient: float
    ways: dict[str, float | str]

    @property
    def prices(self) -> dict[str, float]:
        """Those that are known."""
        return {name: price for name, price in self.ways.items() if isinstance(price, float)}


def measure(leaf: Leaf, num_rounds: int) -> Measured:
    """Times the weight gradient, and each way to the norms and the weight gradient."""
    arrays = leaf.arrays()

    def compiled_of(function: Callable[..., Any]) -> Compiled | str:
        compiled = Compiled.of(function, arrays)
        if compiled.needs_too_much:
            return "out of memory"
        compiled.run(arrays)
        return compiled

    chosen, tried = _tried(leaf, compiled_of)
    compiled = {name: found for name, found in tried.items() if isinstance(found, Compiled)}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    # A single run on an accelerator may take less time than it takes to send it there.
    repeats = 1 if jax.default_backend() == "cpu" else 20
    for index in range(num_rounds):
        for name in list(compiled)[:: 1 if index % 2 else -1]:
            seconds[name].append(compiled[name].run(arrays, repeats))
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    ways = {name: medians.get(name, str(found)) for name, found in tried.items()}
    return Measured(chosen, float(ways.pop("")), ways)


def estimate(leaf: Leaf, target: Target) -> Measured:
    """What the compiler for a device that is not there says of them."""

    def price(function: Callable[..., Any]) -> float:
        plan = plan_of(function, leaf.use.types, target, is_image=leaf.is_image)
        return float(plan[target.price])

    with target.pretended():
        chosen, ways = _tried(leaf, price)
    gradient = ways.pop("")
    assert isinstance(gradient, float)
    return Measured(chosen, gradient, ways)


def _tried(
    leaf: Leaf, find: Callable[[Callable[..., Any]], _Found | str]
) -> tuple[str, dict[str, _Found | str]]:
    """The name of the way chosen, and what is found of each way, and of the gradient alone."""
    ways: list[Way] = []

    def keep(*arrays: Any) -> None:
        ways.extend(leaf.ways(*arrays))

    jax.eval_shape(keep, *leaf.use.types)
    device = platform()
    costs = {way.name: cost(way, device, needs_gradient=False) for way in ways}
    found = {"": find(leaf.gradient)}
    for name in costs:
        if costs[name] > _HOPELESS * min(costs.values()):
            found[name] = "not tried"
            continue
        try:
            found[name] = find(functools.partial(leaf.squares_and_gradient, name))
        except Exception as error:  # The table says so; the others are not lost.
            exhausted = "RESOURCE_EXHAUSTED" in str(error)
            found[name] = "out of memory" if exhausted else type(error).__name__
    return cheapest(ways, device, needs_gradient=True).name, found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    target = TARGETS.get(options.device)
    if target is None:
        unit, title = _MILLISECONDS, f"{machine()}; medians of {options.rounds} rounds"
        price = functools.partial(measure, num_rounds=options.rounds)
    else:
        (device, *_) = target.devices_or_exit()
        unit = f"million {target.price}"
        title = f"{machine(with_load=False)}; compiled for {device.device_kind}, {unit}"
        price = functools.partial(estimate, target=target)
    print(title)
    for name in options.models or PRESETS[options.preset]:
        problem = problem_of(name, options.batch_size)
        text = _table_of(problem, options.leaves, price, unit)
        print(f"\n**{name}**, N={problem.batch_size}\n\n{text}")


def _table_of(
    problem: Problem, parts: Sequence[str], price: Callable[[Leaf], Measured], unit: str
) -> str:
    with_rules = list(leaves_of(problem))
    leaves = [leaf for leaf in with_rules if any(part in leaf.path for part in parts)]
    if not leaves:
        paths = ", ".join(leaf.path for leaf in with_rules)
        sys.exit(f"--leaves must be part of a path, got {' '.join(parts)}; there are {paths}")
    counts = Counter(leaf.key for leaf in leaves)
    kinds = {leaf.key: leaf for leaf in reversed(leaves)}
    results: list[tuple[Leaf, Measured]] = []
    for leaf in reversed(kinds.values()):
        print(f"{len(results) + 1} of {len(kinds)}: {leaf.path}", file=sys.stderr, flush=True)
        results.append((leaf, price(leaf)))
    names = list(dict.fromkeys(name for _, measured in results for name in measured.ways))
    scale = 1e3 if unit == _MILLISECONDS else 1e-6

    def cell(measured: Measured, name: str) -> str:
        price = measured.ways.get(name, "")
        text = f"{price * scale:.3f}" if isinstance(price, float) else price
        return f"**{text}**" if name == measured.chosen else text

    lines = [
        (
            leaf.path,
            str(counts[leaf.key]),
            "x".join(map(str, leaf.shape)),
            f"{measured.gradient * scale:.3f}",
            *(cell(measured, name) for name in names),
        )
        for leaf, measured in results
    ]

    def total(price_of: Callable[[Measured], float]) -> str:
        return f"{scale * sum(counts[leaf.key] * price_of(of) for leaf, of in results):.1f} {unit}"

    gradient = total(lambda measured: measured.gradient)
    chosen = total(lambda measured: measured.prices.get(measured.chosen, np.nan))
    lowest = total(lambda measured: min(measured.prices.values(), default=np.nan))
    rest = len(jax.tree.leaves(problem.params)) - len(with_rules)
    return (
        f"{table(('leaf', 'such leaves', 'shape', 'gradient', *names), lines)}\n\n"
        f"Together: {gradient} for the gradient alone, {chosen} by the ways chosen, {lowest} "
        f"by the best. {rest} leaves have no rule."
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leaves",
        description="Times every way to the norms of every leaf, with the weight gradient.",
    )
    parser.add_argument(
        "--device",
        choices=TARGETS,
        help="one that is not there: what its compiler says; nothing runs",
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="models; default: cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME")
    parser.add_argument(
        "--leaves",
        nargs="+",
        default=[""],
        metavar="PART",
        help="only those with this in their path; default: all",
    )
    parser.add_argument("--rounds", type=int, default=10, help="runs of each way; default: 10")
    parser.add_argument("--batch-size", type=int, help="default: the model's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
