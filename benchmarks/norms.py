"""What exact per-example gradient norms cost: `python -m benchmarks.norms`."""

import sys

from benchmarks.models import MODELS, PRESETS
from benchmarks.timing import Compiled, time_pairs
from benchmarks.variants import VARIANTS, plain


def main() -> None:
    names = sys.argv[1:] or PRESETS["cpu"]
    for name in names:
        loss_fn, params, batch = MODELS[name]()
        args = (params, *batch)
        size = batch[0].shape[0]
        base = Compiled.of(plain(loss_fn, len(args), size), *args)
        print(f"{name} N={size} plain {base.seconds(*args):.3f} s", flush=True)
        for variant in VARIANTS:
            try:
                compiled = Compiled.of(VARIANTS[variant](loss_fn, len(args), size), *args)
            except NotImplementedError as error:
                print(f"  {variant}: refused: {error}")
                continue
            pairs = time_pairs(base, compiled, args, 7)
            low, high = pairs.interval
            print(
                f"  {variant:25} time {pairs.ratio:.2f} ({low:.2f}-{high:.2f})  "
                f"memory {compiled.temp_bytes / base.temp_bytes:.2f}  "
                f"flops {compiled.flops / base.flops:.2f}  "
                f"trace {compiled.trace_seconds:.1f} compile {compiled.compile_seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
