"""The learning rate over the steps of a run."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import optax

ScheduleName = Literal["polynomial", "cosine", "step", "constant"]

# Goyal et al., "Accurate, Large Minibatch SGD" (2017), at epochs 30, 60 and 80 of 90.
STEP_FACTOR = 0.1


def make_schedule(
    name: str,
    *,
    peak: float,
    end: float,
    warmup_steps: int,
    num_steps: int,
    boundaries: Sequence[int] = (),
) -> optax.Schedule:
    r"""Rises in equal steps to the peak, then falls as the name says.

    The first step already moves: with w steps of warm-up the rates are peak / (w + 1) times
    1, 2, ..., w, and then the peak, where the decay begins. This is the gradual warm-up of Goyal et
    al. (2017), but that they start at the rate of a batch of 256. With t the share of the remaining
    steps that is over:

    ==========  ==================================================================
    polynomial  end + (peak - end) (1 - t)^2, as for LARS and CLARS
    cosine      end + (peak - end) (1 + cos(pi t)) / 2
    step        peak times 0.1 for each boundary reached
    constant    peak
    ==========  ==================================================================

    Args:
        name: one of `ScheduleName`.
        peak: the largest learning rate.
        end: of polynomial and cosine: the rate at the step after the last.
        warmup_steps: steps before the peak; 0 for none.
        num_steps: steps of the whole run.
        boundaries: of step: the first steps at a tenth, a hundredth, ... of the peak.

    Raises:
        ValueError: if an argument makes no sense, or has no place in this schedule.
    """
    if name not in get_args(ScheduleName):
        *others, last = map(repr, get_args(ScheduleName))
        raise ValueError(f"--schedule is {name!r}, but must be {', '.join(others)} or {last}.")
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"--warmup-epochs comes to {warmup_steps} steps, but the whole run has {num_steps}: "
            "warm up for less, or train for longer."
        )
    _check_end(name, end, peak)
    _check_boundaries(name, boundaries, warmup_steps, num_steps)
    decay_steps = num_steps - warmup_steps
    if name == "polynomial":
        decay = optax.polynomial_schedule(peak, end, power=2, transition_steps=decay_steps)
    elif name == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=end / peak)
    else:
        # Counted from the end of the warm-up, as `join_schedules` counts.
        decay = optax.piecewise_constant_schedule(
            peak, {boundary - warmup_steps: STEP_FACTOR for boundary in boundaries}
        )
    if warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def advanced(opt_state: Any, steps: Any) -> Any:
    """The state of an optimizer whose schedules are so many steps further, and nothing else.

    Args:
        opt_state: the state.
        steps: how many, int32.
    """

    def is_schedule(state: Any) -> bool:
        return isinstance(state, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda state: state._replace(count=state.count + steps) if is_schedule(state) else state,
        opt_state,
        is_leaf=is_schedule,
    )


def _check_end(name: str, end: float, peak: float) -> None:
    if name in ("step", "constant") and end != 0:
        raise ValueError(
            f"--end-learning-rate is {end:g}, but the schedule {name} has no such thing: set it to "
            "0, or choose polynomial or cosine."
        )
    if not 0 <= end < peak:
        raise ValueError(
            f"--end-learning-rate is {end:g}, but must be at least 0 and less than the peak of the "
            f"learning rate, {peak:g}."
        )


def _check_boundaries(
    name: str, boundaries: Sequence[int], warmup_steps: int, num_steps: int
) -> None:
    if name != "step":
        if boundaries:
            raise ValueError(
                f"--decay-epochs is given, but the schedule {name} has no such thing: say "
                "--decay-epochs without any, or choose step."
            )
        return
    if not boundaries:
        raise ValueError(
            "--decay-epochs is missing: the schedule step falls to a tenth at each of them. Name "
            "some, or choose another schedule."
        )
    steps = ", ".join(map(str, boundaries))
    if sorted(set(boundaries)) != list(boundaries):
        raise ValueError(
            f"--decay-epochs comes to the steps {steps}, but each must come after the one before."
        )
    if not warmup_steps < boundaries[0] <= boundaries[-1] < num_steps:
        raise ValueError(
            f"--decay-epochs comes to the steps {steps}, but each must lie between the end of the "
            f"warm-up, at {warmup_steps}, and that of the run, at {num_steps}."
        )
