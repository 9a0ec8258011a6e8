"""The command line: `python -m train [configuration] [options]`."""

import sys
from collections.abc import Sequence

import tyro

from train import processes
from train.config import Config
from train.configs import CONFIGS
from train.loop import prepare, train
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
    config = parse(sys.argv[1:])
    try:
        validate_cluster(config)
        processes.join(config)
        prepared = prepare(config)
    except (ValueError, OSError) as error:
        print(f"python -m train: {error}", file=sys.stderr)
        sys.exit(2)
    train(prepared)


if __name__ == "__main__":
    main()
