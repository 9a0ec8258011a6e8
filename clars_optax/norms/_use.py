"""An operation that parameters enter: its results and cotangents, for all examples or for some."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._layout import Layout, examples_first
from clars_optax.norms._program import Operation
from clars_optax.norms._rows import Rows
from clars_optax.norms._rules import Elementwise, Platform, Rule, Way
from clars_optax.norms._rules._products import sum_of_rows


@dataclass(frozen=True)
class Use:
    """An operation that some values with shadows enter.

    `shadowed` are the positions, among the operation's arguments, of the values with shadows;
    `active` those of the other arguments to which a gradient flows. `twin` is the operation in the
    loss of as many examples as a row has, for a function with a derivative of its own, which knows
    only the size that it was traced at.
    """

    operation: Operation
    layouts: tuple[Layout, ...]
    output_layouts: tuple[Layout, ...]
    shadowed: tuple[int, ...]
    active: tuple[int, ...]
    twin: Operation | None = None

    @property
    def types(self) -> tuple[list[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
        """Those of the arguments, and of the first result's cotangent."""
        arguments = [jax.ShapeDtypeStruct(x.shape, x.aval.dtype) for x in self.operation.arguments]
        result = self.operation.outputs[0]
        return arguments, jax.ShapeDtypeStruct(result.shape, result.aval.dtype)

    def local(self, arguments: Sequence[Any], examples: int | None) -> list[Any]:
        """The differentiable results for some of the examples; None: for all of them."""
        changed: dict[str, Any] = {}
        if examples is not None and self.twin is not None:
            return self.differentiable(self.twin.apply(*arguments))
        if examples is not None:
            # Where the primitive's own parameters hold the batch size.
            shape = self.output_layouts[0].local_shape(examples)
            match self.operation.name:
                case "broadcast_in_dim":
                    changed["shape"] = shape
                case "reshape":
                    changed["new_sizes"] = shape
                case "gather":
                    sizes = self.operation.params["slice_sizes"]
                    whole = self.operation.operands[0].shape
                    here = self.layouts[0].local_shape(examples)
                    changed["slice_sizes"] = tuple(
                        part if size == full else size
                        for size, full, part in zip(sizes, whole, here, strict=True)
                    )
                case "scan" if any(layout.carries_batch for layout in self.layouts):
                    # That of `jax.lax.map` over the examples.
                    changed["length"] = examples
                case "tile":
                    before = self.layouts[0].local_shape(examples)
                    changed["reps"] = tuple(a // b for a, b in zip(shape, before, strict=True))
        return self.differentiable(self.operation.apply(*arguments, **changed))

    def differentiable(self, outputs: Sequence[Any]) -> list[Any]:
        """Those of the outputs that have a gradient."""
        kept = zip(self.operation.outputs, outputs, strict=True)
        return [output for value, output in kept if value.is_differentiable]

    def pull(
        self,
        arguments: Sequence[Any],
        cotangents: list[Any],
        wanted: Sequence[int],
        examples: int | None = None,
    ) -> tuple[Any, ...]:
        """The cotangents of the wanted arguments; `examples` as in `local`."""

        def run(*changed: Any) -> list[Any]:
            everything = list(arguments)
            for index, x in zip(wanted, changed, strict=True):
                everything[index] = x
            return self.local(everything, examples)

        _, pull = jax.vjp(run, *(arguments[index] for index in wanted))
        return pull(cotangents)

    def pull_rows(
        self, arguments: Sequence[Any], cotangents: list[Any], wanted: Sequence[int], rows: Rows
    ) -> list[Any]:
        """`pull` for every row: cotangents come in, and go out, with one row per copy.

        A cotangent is a pair of the rows and, where the last one has a shape of its own, that one.
        """
        cut = [
            rows.cut(argument, layout) if layout.carries_batch else None
            for argument, layout in zip(arguments, self.layouts, strict=True)
        ]
        shared = [x if part is None else None for x, part in zip(arguments, cut, strict=True)]

        def joined(mapped: list[Any]) -> list[Any]:
            return [
                other if own is None else own for own, other in zip(mapped, shared, strict=True)
            ]

        examples = 1 if rows.by_example else rows.group_size
        pulled = jax.vmap(
            lambda mapped, cotangent: self.pull(joined(mapped), cotangent, wanted, examples)
        )([part and part[0] for part in cut], [cotangent[0] for cotangent in cotangents])
        if all(cotangent[1] is None for cotangent in cotangents):
            return list(pulled)
        rest = [cotangent[1] for cotangent in cotangents]
        if self.twin is not None:
            # All examples, of which those in groups have no cotangents.
            layouts = self.differentiable(self.output_layouts)
            places = [rows.place_rest(x, y) for x, y in zip(rest, layouts, strict=True)]
            last = self.pull(arguments, places, wanted)
        else:
            last = self.pull(
                joined([part and part[1] for part in cut]),
                rest,
                wanted,
                rows.num_examples - rows.num_norm_examples,
            )
        return [jnp.concatenate([x, y[None]]) for x, y in zip(pulled, last, strict=True)]

    def for_rule(
        self, arguments: Sequence[Any], cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The operand that carries the batch and the cotangent, both `[N, *axes]`."""
        (other,) = (i for i, layout in enumerate(self.layouts) if layout.carries_batch)
        return (
            examples_first(arguments[other], self.layouts[other]),
            examples_first(cotangent, self.output_layouts[0]),
        )

    def ways(
        self,
        rule: Rule,
        arguments: Sequence[Any],
        cotangent: jax.Array,
        rows: Rows,
        device: Platform,
    ) -> list[Way]:
        """The ways of a rule to the squared norms."""
        x, g = self.for_rule(arguments, cotangent)
        return rule.ways(rows.grouped(x), rows.grouped(g), rows.scale, device)

    def rows_by_rule(
        self,
        rule: Elementwise,
        arguments: Sequence[Any],
        cotangent: jax.Array,
        rows: Rows,
        device: Platform,
    ) -> jax.Array:
        """The cotangent of the only shadow: what `pull_rows` gives, by a rule."""
        (parameter,) = self.shadowed
        x, g = self.for_rule(arguments, cotangent)
        found = rule.rows(rows.grouped(x), rows.grouped(g), device)
        if rows.has_rest:
            x, g = (y[None, rows.num_norm_examples :] for y in (x, g))
            rest = rule.rows(x, g, device)
            found = jnp.concatenate([found, rest])
        return found.astype(arguments[parameter].dtype)

    def gather(self, index: int, argument: Any, cotangents: jax.Array, rows: Rows) -> Any:
        """The cotangent of an argument from those of its entries per row."""
        layout = self.layouts[index]
        if not layout.carries_batch:
            return sum_of_rows(cotangents)
        _, pull = jax.vjp(lambda x: rows.cut(x, layout)[0], argument)
        return pull(cotangents)[0]

    def placed(self, shadowed: Sequence[Any], active: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Cotangents for the shadows and for the arguments, None where no gradient flows."""
        places = dict(zip(self.active, active, strict=True))
        return list(shadowed), [places.get(i) for i in range(len(self.operation.arguments))]
