"""Checkpoints of the training state, written by Orbax: the last one and the best one are kept.

Arrays are saved as the host has them, whole, so that a run may go on with another number of devices
or processes. The process with index 0 writes; all must call.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from train.state import TrainState

METRIC = "test_accuracy"


def open_folder(folder: Path) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, each named by its step."""

    def accuracy(metrics: dict[str, float]) -> float:
        return metrics[METRIC]

    options = ocp.CheckpointManagerOptions(
        best_fn=accuracy,
        preservation_policy=AnyPreservationPolicy([LatestN(1), BestN(get_metric_fn=accuracy, n=1)]),
    )
    return ocp.CheckpointManager(folder.resolve(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: TrainState, metrics: dict[str, float]) -> None:
    """Saves the state under its step; the files are written while training goes on.

    Args:
        checkpoints: from `open_folder`.
        state: the same on every device.
        metrics: of this state; `METRIC` decides which checkpoint is the best one.
    """
    arrays = jax.device_get(_arrays(state))
    checkpoints.save(
        int(arrays["step"]),
        metrics=metrics,
        args=ocp.args.Composite(state=ocp.args.StandardSave(arrays)),
    )


def restore(
    checkpoints: ocp.CheckpointManager, state: TrainState
) -> tuple[TrainState, dict[str, float]]:
    """Returns the last checkpoint, as arrays of the host, and its metrics.

    Args:
        checkpoints: from `open_folder`.
        state: a state of the same model and optimizer, which gives the structure.
    """
    step = checkpoints.latest_step()
    arrays = jax.device_get(_arrays(state))
    restored = checkpoints.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays))
    )
    return state.replace(**restored.state), checkpoints.metrics(step)


def _arrays(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "batch_stats": state.batch_stats,
        "ema_params": state.ema_params,
    }
