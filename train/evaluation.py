"""Loss and accuracy of a state over all held-out examples."""

from collections.abc import Callable, Sequence

import jax

from train.body import make_eval_body
from train.build import accumulation_of, image_shape_of
from train.data.pipeline import eval_batches
from train.errors import RunError, ending_the_run
from train.interruption import Interruption
from train.setup import Prepared
from train.state import TrainState
from train.step import AXIS, pmap_eval_step, shard

Evaluate = Callable[[TrainState, Interruption], dict[str, float] | None]


def make_evaluation(prepared: Prepared, devices: Sequence[jax.Device]) -> Evaluate:
    """Makes the evaluation of a run.

    Args:
        prepared: the run.
        devices: those of all processes.

    Returns:
        A function of the state that gives mean loss and accuracy over all examples, and how many
        could not be used, where some may be passed over; None if it was interrupted.
    """
    config = prepared.config
    eval_step = pmap_eval_step(make_eval_body(prepared.dataset, AXIS), devices)
    at_a_time = accumulation_of(config, len(devices)).at_a_time
    num_examples = len(prepared.test_examples)

    def evaluate(state: TrainState, interruption: Interruption) -> dict[str, float] | None:
        batches = eval_batches(
            prepared.dataset,
            prepared.test_examples,
            batch_size=at_a_time * len(devices),
            image_size=image_shape_of(config, prepared.dataset)[0],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            max_bad_examples=config.max_bad_examples,
        )
        sums = {"loss": 0.0, "correct": 0.0, "examples": 0.0}
        while True:
            with ending_the_run():
                batch = next(batches, None)
            if batch is None:
                break
            if interruption.reached():
                return None
            batch.pop("bad_examples")  # Those of all processes are what is missing in the end.
            of_batch = jax.device_get(eval_step(state, shard(batch, devices)))
            sums = {name: value + float(of_batch[name]) for name, value in sums.items()}
        if not sums["examples"]:
            raise RunError("none of the held-out examples can be used: prepare the data set again.")
        evaluation = {
            "test_loss": sums["loss"] / sums["examples"],
            "test_accuracy": sums["correct"] / sums["examples"],
        }
        if config.max_bad_examples:
            evaluation["bad_examples"] = num_examples - round(sums["examples"])
        return evaluation

    return evaluate
