"""The command line: `python -m train [configuration] [options]`."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
import tyro

from train import processes
from train.checkpoint import steps_in
from train.config import Config
from train.configs import CONFIGS
from train.errors import RunError, remedy_of
from train.loop import train
from train.run_folder import CHECKPOINTS
from train.setup import Prepared, prepare
from train.validation import validate_cluster


def parse(arguments: Sequence[str]) -> Config:
    """Reads the command line: the options override the named configuration."""
    # Which defaults --help shows depends on the configuration that is named beside it.
    without_help = [argument for argument in arguments if argument not in ("-h", "--help")]
    name = _cli(without_help, CONFIGS["digits"]).config
    return _cli(arguments, CONFIGS[name])


def _cli(arguments: Sequence[str], default: Config) -> Config:
    return tyro.cli(Config, prog="python -m train", args=arguments, default=default)


def main() -> None:
    """Runs the command line."""
    try:
        _run(parse(sys.argv[1:]))
    except jax.errors.JaxRuntimeError as error:
        description = processes.describe(error)
        if description is None:
            raise
        _exit(description, 1)


def _run(config: Config) -> None:
    try:
        validate_cluster(config)
        processes.join(config)
        prepared = prepare(config)
    except (ValueError, OSError) as error:
        _say(error)
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted before the first step: nothing is lost.")
        sys.exit(130)
    try:
        train(prepared)
    except RunError as error:
        if error.exit_code > 128:  # All processes end with the same step.
            processes.leave()
        _exit(error, error.exit_code)
    except OSError as error:
        _exit(_failure(error, prepared), 1)


def _failure(error: OSError, prepared: Prepared) -> str:
    """Says what the system has refused, and how the run goes on."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    option = f" and --workdir {prepared.workdir}" if prepared.config.workdir is None else ""
    try:
        steps = steps_in(prepared.workdir / CHECKPOINTS)
    except OSError:  # The whole file system may be gone.
        how = "goes on from the last checkpoint, if there is one"
    else:
        how = (
            f"goes on from the checkpoint of step {steps[-1]}"
            if steps
            else "begins anew, for there is no checkpoint yet"
        )
    return (
        f"{what}. The run ends here: {remedy_of(error.errno)} and start again with the same "
        f"command{option}, which {how}."
    )


def _say(problem: object) -> None:
    print(f"python -m train: {problem}", file=sys.stderr, flush=True)


def _exit(problem: object, code: int) -> NoReturn:
    # Where they are written to a full disk, there is no room for the last words.
    with contextlib.suppress(OSError):
        _say(problem)
        sys.stdout.flush()
    # Not sys.exit: threads that read ahead would be waited for, with a large batch for long.
    os._exit(code)


if __name__ == "__main__":
    main()
