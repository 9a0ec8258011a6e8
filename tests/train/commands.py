"""`python -m train` in processes of its own, as a user runs it, or in this one."""

import json
import os
import socket
import subprocess
import sys
import time

import jax

from train.loop import train


def run_here(prepared):
    """Trains in this process.

    A program that a process traces for a second time may come out another, and what was compiled
    before does not serve it: so it forgets.
    """
    jax.clear_caches()
    train(prepared)


def start(*options, num_devices=8, program="train"):
    """Starts a run on so many CPU devices; `tests.train.small` has a smaller network."""
    environment = {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
        f"--xla_force_host_platform_device_count={num_devices}",
        # Most of what a run compiles takes no time, and every run compiles it.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", program, *map(str, options)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(*options_of_each):
    """Starts two processes of two devices, with the smaller network."""
    address = f"127.0.0.1:{free_port()}"
    return [
        start(
            *options,
            *("--coordinator", address, "--num-processes", 2, "--process-id", index),
            num_devices=2,
            program="tests.train.small",
        )
        for index, options in enumerate(options_of_each)
    ]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(*processes, seconds=600):
    """Waits for runs that end well, and returns what they say."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


def refusals(*processes):
    """Waits for runs that are refused in one line, and returns these."""
    outputs = [process.communicate(timeout=600) for process in processes]
    lines = [errors.splitlines()[-1] for _, errors in outputs]
    assert [process.returncode for process in processes] == [2] * len(processes), outputs
    assert all(line.startswith("python -m train: ") for line in lines)
    return [line.removeprefix("python -m train: ") for line in lines]


def wait_until(condition, *processes):
    """Waits for the condition while all of the runs go on."""
    deadline = time.monotonic() + 600
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_step(step, workdir, *processes):
    """Waits until so many steps are done."""
    wait_until(lambda: any(line["step"] >= step for line in lines_of(workdir)), *processes)


def kill_when(condition, process):
    """Ends a run as a power cut does, as soon as the condition holds."""
    with process:
        wait_until(condition, process)
        process.kill()


def lines_of(workdir):
    """The whole lines of the record of a run."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def numbers_of(workdir):
    """The record without the times."""
    return [
        {name: value for name, value in line.items() if "seconds" not in name}
        for line in lines_of(workdir)
    ]
