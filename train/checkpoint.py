"""Checkpoints of the training state, written by Orbax."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from train.state import TrainState


def open_folder(folder: Path) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, one for each step that was saved."""
    return ocp.CheckpointManager(folder.resolve())


def save(checkpoints: ocp.CheckpointManager, state: TrainState) -> None:
    """Saves the state under its step, and waits until it is on disk."""
    # The last step counts whether or not the manager's save interval meets it.
    checkpoints.save(
        int(state.step),
        args=ocp.args.Composite(state=ocp.args.StandardSave(_arrays(state))),
        force=True,
    )
    checkpoints.wait_until_finished()


def restore(checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """Returns the latest checkpoint.

    Args:
        checkpoints: from `open_folder`.
        state: a state of the same model and optimizer, which gives structure and devices.
    """
    restored = checkpoints.restore(
        checkpoints.latest_step(),
        args=ocp.args.Composite(state=ocp.args.StandardRestore(_arrays(state))),
    )
    return state.replace(**restored.state)


def _arrays(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "batch_stats": state.batch_stats,
    }
