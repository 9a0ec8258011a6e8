"""What exact per-example gradient norms cost, beside the plain gradient and beside other ways.

`python -m benchmarks.norms` prints one table; `benchmarks/README.md` says what is in it.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.models import MODELS, PRESETS, Problem, problem_of
from benchmarks.report import AGAIN, ModelRows, Row, machine, markdown
from benchmarks.timing import Compiled, time_pairs
from benchmarks.variants import VARIANTS, Variant, plain


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    header = machine()
    models: list[ModelRows] = []
    for name in options.models or PRESETS[options.preset]:
        problem = problem_of(name, options.batch_size)
        base = Compiled.of(plain(problem), problem.args)
        models.append(ModelRows(name, problem.batch_size, base))
        for variant in (AGAIN, *(options.variants or VARIANTS)):
            print(f"{name}: {variant} ...", end=" ", file=sys.stderr, flush=True)
            make = plain if variant == AGAIN else VARIANTS[variant]
            row = _measure(variant, make, problem, base, options.pairs)
            models[-1].rows.append(row)
            print(*row.time, row.message, file=sys.stderr, flush=True)
            if options.output:
                # After each row, so that an interrupted run leaves what it has measured.
                _write(options.output, header, options.pairs, models)
    print(markdown(header, options.pairs, models))


def _measure(name: str, make: Variant, problem: Problem, base: Compiled, num_pairs: int) -> Row:
    compiled = None
    try:
        compiled = Compiled.of(make(problem), problem.args)
        if compiled.needs_too_much:
            return Row(name, compiled, failure="out of memory")
        run_base, run = (functools.partial(x.run, problem.args) for x in (base, compiled))
        return Row(name, compiled, time_pairs(run_base, run, num_pairs))
    except NotImplementedError as error:
        return Row(name, failure="refused", message=str(error))
    except Exception as error:  # An hour's table is not lost for one of its cells.
        exhausted = "RESOURCE_EXHAUSTED" in str(error)
        failure = "out of memory" if exhausted else type(error).__name__
        return Row(name, compiled, failure=failure, message=str(error))


def _write(folder: Path, header: str, num_pairs: int, models: Sequence[ModelRows]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"machine": header, "models": [model.numbers() for model in models]}
    (folder / "norms.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (folder / "norms.md").write_text(markdown(header, num_pairs, models) + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.norms",
        description="Cost of per-example gradient norms, as ratios to jax.value_and_grad.",
    )

    def several(option: str, names: Iterable[str], what: str) -> None:
        text = f"{what}; of {', '.join(names)}"
        parser.add_argument(option, nargs="+", choices=names, metavar="NAME", help=text)

    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="models; default: cpu")
    several("--models", MODELS, "instead of those of the preset")
    several("--variants", VARIANTS, f"besides {AGAIN}; default: all")
    parser.add_argument("--pairs", type=int, default=30, help="runs for a ratio; default: 30")
    parser.add_argument("--batch-size", type=int, help="a multiple of 16; default: the model's")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="gets the table, norms.md, and norms.json"
    )
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    if options.batch_size is not None and (options.batch_size < 1 or options.batch_size % 16):
        parser.error("--batch-size must be a multiple of 16")
    return options


if __name__ == "__main__":
    main()
