"""Checkpoints of the training state that are whole, or are noticed not to be.

Orbax writes the arrays. Around them:

=====================  =====================================================================
120/                   the checkpoint of step 120: it has this name only once all is in it
120/state/             the arrays, as Orbax lays them out
120/evaluation.json    the evaluation of this state; empty where there was none
120/checksums.txt      SHA-256 and size of every other file, and the SHA-256 of these lines
unfinished.<time>/     what is being written, or what a kill has left of it
120.replaced/          a checkpoint whose step was saved again, until the new one has its name
=====================  =====================================================================

Arrays are saved as the host has them, whole, so that a run may go on with another number of devices
or processes. The process with index 0 writes, and says which checkpoint is whole; all must call.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from train.checksums import damage_of, write_checksums
from train.errors import RunError, remedy_of
from train.processes import from_first_process
from train.state import TrainState
from train.text import listed

METRIC = "test_accuracy"
_STATE = "state"
_EVALUATION = "evaluation.json"
_UNFINISHED = "unfinished."
_REPLACED = ".replaced"
# So that a newest one that is damaged has one before it.
_NUM_LAST = 2


class Checkpoints:
    """The checkpoints of a run: the last two, and the one with the highest test accuracy.

    A context manager; what is being written at the end of the block is waited for.

    Args:
        folder: holds a folder for each, named by its step. It is made by the first `save`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        # Orbax serves this process alone: what all must know travels by `from_first_process`.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        self._orbax = ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            multiprocessing_options=alone,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str | None] | None = None
        # Known only to the first process, and only of what it has read or written itself: the
        # evaluations of whole checkpoints, and what is wrong with the others.
        self._whole: dict[int, dict[str, float]] = {}
        self._damaged: dict[int, str] = {}

    def __enter__(self) -> "Checkpoints":
        logging.getLogger("absl").addFilter(_is_not_an_error_of_orbax)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
            # The other processes may be elsewhere, so that nothing can be agreed with them.
            elif problem := self._problem():
                error.add_note(problem)
        finally:
            self._thread.shutdown()
            self._orbax.close()
            logging.getLogger("absl").removeFilter(_is_not_an_error_of_orbax)

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints on the disk, whole or not, in ascending order."""
        return steps_in(self._folder)

    def arrays(self, step: int) -> dict[str, Any]:
        """Returns the arrays of a checkpoint in nested dicts and lists, without a check."""
        return self._orbax.restore(
            self._folder / str(step) / _STATE, args=ocp.args.StandardRestore()
        )

    def save(self, state: TrainState, evaluation: dict[str, float]) -> None:
        """Saves the state under its step; the files are written while training goes on.

        Args:
            state: the same on every device.
            evaluation: of this state; `METRIC` decides which checkpoint is the best one. Empty
                where it was not evaluated: then it cannot be the best one.

        Raises:
            RunError: the checkpoint before it could not be written.
        """
        self.wait()
        if jax.process_index() == 0:
            # Copies: a view, as a CPU gives, would keep the next step from reusing the memory.
            arrays = jax.tree.map(np.array, _arrays(state))
            self._writing = self._thread.submit(self._try_to_write, arrays, evaluation)

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
            RunError: it could not be written; the other checkpoints are as they were.
        """
        problem = from_first_process(self._problem())
        if problem is not None:
            raise RunError(problem)

    def restore(
        self, state: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, float]] | None:
        """Returns the newest whole checkpoint, as arrays of the host, and its evaluation.

        Args:
            state: a state of the same model and optimizer, which gives the structure.
            say: gets a line for each newer one that is damaged.

        Returns:
            None where there is no checkpoint.

        Raises:
            RunError: none of the checkpoints is whole, or the newest whole one is of another
                model or optimizer; then the folder is left as it is.
        """
        self.wait()
        arrays = _arrays(state)
        # One process looks, lest two see different things.
        found = from_first_process(self._look(arrays) if jax.process_index() == 0 else None)
        for line in found["skipped"]:
            say(line)
        if found["problem"] is not None:
            raise RunError(found["problem"])
        if found["step"] is None:
            return None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        restored = self._orbax.restore(
            self._folder / str(found["step"]) / _STATE, args=ocp.args.StandardRestore(shapes)
        )
        return state.replace(**restored), found["evaluation"]

    def _look(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Finds the newest whole checkpoint, and what speaks against it."""
        self._put_back()
        damages = {step: damage_of(self._folder / str(step)) for step in self.steps()}
        self._damaged = {
            step: f"{self._folder.name}/{step}/{damage}"
            for step, damage in damages.items()
            if damage
        }
        self._whole = {
            step: json.loads((self._folder / str(step) / _EVALUATION).read_text(encoding="utf-8"))
            for step in damages.keys() - self._damaged.keys()
        }
        newest = max(self._whole, default=None)
        return {
            "step": newest,
            "evaluation": None if newest is None else self._whole[newest],
            "skipped": [
                f"checkpoint {step} is damaged ({damage}): skipped for the one before it"
                for step, damage in reversed(self._damaged.items())
                if newest is not None and step > newest
            ],
            "problem": self._none_is_whole() if newest is None else self._misfit(newest, arrays),
        }

    def _put_back(self) -> None:
        """Undoes a replacement that a kill has cut in two."""
        for replaced in self._folder.glob(f"*{_REPLACED}"):
            if not replaced.with_suffix("").exists():
                replaced.rename(replaced.with_suffix(""))

    def _none_is_whole(self) -> str | None:
        if not self._damaged:
            return None
        return (
            f"no checkpoint in {self._folder} is whole ({', '.join(self._damaged.values())}): "
            "restore one of them from a copy, or name a new --workdir."
        )

    def _misfit(self, step: int, arrays: dict[str, Any]) -> str | None:
        """Says where a checkpoint and the run differ."""
        path = self._folder / str(step)
        there = _description(self._orbax.metadata(path / _STATE).item_metadata.tree)
        here = _description(arrays)
        for name in [*here, *there]:
            if there.get(name) != here.get(name):
                return (
                    f"{path} is a checkpoint of another model or optimizer ({name}: "
                    f"{there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here): go on "
                    "with the options that it began with, or name a new --workdir."
                )
        return None

    def _problem(self) -> str | None:
        """Waits for the thread, and says what went wrong in it."""
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def _try_to_write(self, arrays: dict[str, Any], evaluation: dict[str, float]) -> str | None:
        """Writes a checkpoint, or says why that was not possible."""
        # A name of its own, for Orbax may go on for a while with one that it has given up.
        unfinished = self._folder / f"{_UNFINISHED}{time.time_ns()}"
        step = int(arrays["step"])
        try:
            for left_by_a_kill in self._folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left_by_a_kill, ignore_errors=True)
            unfinished.mkdir(parents=True)
            self._write(unfinished, arrays, evaluation)
            self._name(unfinished, step)
        except (OSError, ValueError) as error:
            code = _error_code(error)
            if code is None:
                raise
            # Lest the space be missed by whoever has to free some.
            shutil.rmtree(unfinished, ignore_errors=True)
            return self._failure(step, code)
        self._damaged.pop(step, None)
        self._whole[step] = evaluation
        self._remove_outdated()
        return None

    def _write(self, folder: Path, arrays: dict[str, Any], evaluation: dict[str, float]) -> None:
        self._orbax.save(folder / _STATE, args=ocp.args.StandardSave(arrays))
        (folder / _EVALUATION).write_text(json.dumps(evaluation) + "\n", encoding="utf-8")
        write_checksums(folder)

    def _name(self, unfinished: Path, step: int) -> None:
        """Makes what was written a checkpoint, in the place of one of the same step."""
        path = self._folder / str(step)
        if path.exists():
            replaced = path.with_suffix(_REPLACED)
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        unfinished.rename(path)

    def _remove_outdated(self) -> None:
        """Removes what the newest checkpoint, which is whole, has made superfluous.

        What this process has not looked at it leaves alone, and so also what is newer and damaged.
        """
        steps = sorted(self._whole)
        evaluated = [step for step in steps if METRIC in self._whole[step]]
        best = max(evaluated, key=lambda step: (self._whole[step][METRIC], step), default=None)
        outdated = set(steps) - {*steps[-_NUM_LAST:], best}
        outdated |= {step for step in self._damaged if step < steps[-1]}
        for step in outdated:
            self._whole.pop(step, None)
            self._damaged.pop(step, None)
        # What cannot be removed costs space, but no run.
        for path in [
            *(self._folder / str(step) for step in outdated),
            *self._folder.glob(f"*{_REPLACED}"),
        ]:
            shutil.rmtree(path, ignore_errors=True)

    def _failure(self, step: int, code: int) -> str:
        return (
            f"checkpoint {step} could not be written to {self._folder}: {os.strerror(code)}. "
            f"{_which_are_whole(sorted(self._whole))}: {remedy_of(code)} and start again with the "
            "same command."
        )


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, which need not be there, whole or not."""
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _is_not_an_error_of_orbax(record: logging.LogRecord) -> bool:
    """Keeps back the tracebacks that Orbax prints of errors that it raises, too."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _arrays(state: TrainState) -> dict[str, Any]:
    return {
        # Flax begins with an int, and its first step makes this of it.
        "step": jnp.asarray(state.step),
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
        "ema": state.ema,
    }


def _description(arrays: dict[str, Any]) -> dict[str, str]:
    """Returns shape and type of each array by its path, in the order of `arrays`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.shape} {leaf.dtype}"
        for name, tree in arrays.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path({name: tree})
    }


def _error_code(error: Exception) -> int | None:
    """Returns the operating system's code of an error; None for any other error."""
    if isinstance(error, OSError):
        return error.errno
    # As the library that Orbax writes with passes them on.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _which_are_whole(steps: list[int]) -> str:
    if not steps:
        return "There is none before it"
    if len(steps) == 1:
        return f"The checkpoint of step {steps[0]} is whole"
    return f"The checkpoints of steps {listed(steps, 'and')} are whole"
