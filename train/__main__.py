"""The command line: `python -m train [configuration] [options]`."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
import tyro

from train import processes
from train.config import Config
from train.configs import CONFIGS
from train.errors import RunError
from train.loop import train
from train.setup import prepare
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
        _exit(f"{error}. The last checkpoint is safe: the same command goes on from it.", 1)


def _say(problem: object) -> None:
    print(f"python -m train: {problem}", file=sys.stderr, flush=True)


def _exit(problem: object, code: int) -> NoReturn:
    _say(problem)
    sys.stdout.flush()
    # Not sys.exit: threads that read ahead would be waited for, with a large batch for long.
    os._exit(code)


if __name__ == "__main__":
    main()
