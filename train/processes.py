"""Several processes, each with devices of its own, that train together."""

import jax

from train.config import Config


def join(config: Config) -> None:
    """Finds the other processes, where the options or the platform name any.

    It must come before anything else that asks JAX for its devices.

    Raises:
        ValueError: "auto" on a platform that says nothing of other processes.
    """
    if config.coordinator is None:
        return
    if config.coordinator != "auto":
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            "--coordinator is auto, but this platform does not tell where the other processes are "
            "(a TPU pod slice, Slurm, Open MPI and Kubernetes do): name --coordinator HOST:PORT, "
            "--num-processes and --process-id."
        ) from error
