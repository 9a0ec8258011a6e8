"""The learning rate over the steps of a run."""

import optax


def warmup_then_polynomial(peak: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """Rises in equal steps to the peak, then falls as (1 - t)^2 to zero.

    The first step already moves: with w steps of warm-up the rates are peak / (w + 1) times
    1, 2, ..., w, and then the peak, where the decay begins.

    Args:
        peak: the largest learning rate.
        warmup_steps: steps before the peak; 0 for none.
        num_steps: steps of the whole run; the rate would be zero at the step after the last.
    """
    decay = optax.polynomial_schedule(
        init_value=peak, end_value=0.0, power=2, transition_steps=num_steps - warmup_steps
    )
    if warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])
