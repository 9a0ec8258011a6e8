"""What XLA plans for a GPU or a TPU, on a machine that has none: memory, and what that would cost.

`python -m benchmarks.plan` prints one table; `benchmarks/planned.md` says what is in it.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

from benchmarks.models import MODELS, PRESETS, problem_of
from benchmarks.report import machine, table
from benchmarks.targets import TARGETS, Plan, plan_of
from benchmarks.variants import VARIANTS, plain

# How to write the numbers of a column, and what they are divided by.
_FORMATS = {
    "memory": ("{:,.0f} MB", 1e6),
    "traffic": ("{:.1f} GB", 1e9),
    "kernels": ("{:,.0f}", 1.0),
    "cycles": ("{:,.1f} M", 1e6),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    target = TARGETS[options.device]
    (device, *_) = target.devices_or_exit()
    lines: list[tuple[str, ...]] = []
    base: Plan = {}
    for name in options.models:
        problem = problem_of(name, options.batch_size)
        print(f"{name} ...", file=sys.stderr, flush=True)
        plan_for = functools.partial(
            plan_of,
            args=problem.args,
            target=target,
            batch_argnums=problem.batch_argnums,
            num_devices=options.num_devices,
        )
        base = plan_for(plain(problem))
        lines.append((f"**{name}**, N={problem.batch_size}", "plain", *cells(base)))
        for variant in options.variants:
            print(f"{name}: {variant} ...", file=sys.stderr, flush=True)
            plan = plan_for(VARIANTS[variant](problem))
            lines.append(("", variant, *(_ratio(plan[key], base[key]) for key in base)))
    print(f"{machine(with_load=False)}; compiled for {device.device_kind}\n")
    print(table(("model", "variant", *base), lines))


def cells(plan: Plan) -> list[str]:
    """Writes numbers with their units."""
    forms = [(number, *_FORMATS[key]) for key, number in plan.items()]
    return [form.format(number / unit) for number, form, unit in forms]


def _ratio(number: float, base: float) -> str:
    # Of a small program, all that is temporary may fit on the chip.
    return f"{number / base:.2f}" if base else ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan",
        description="What XLA plans for a GPU or a TPU, without one.",
    )
    names = PRESETS["gpu"]
    parser.add_argument("--device", choices=TARGETS, default="h100", help="default: h100")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=names, metavar="NAME")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["exact"], metavar="NAME"
    )
    parser.add_argument("--batch-size", type=int, help="default: the model's")
    parser.add_argument(
        "--num-devices",
        type=int,
        default=1,
        help="under `jit`, share the batch out among so many, up to eight GPUs or four TPUs; the "
        "numbers are for one of them (default: 1)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
