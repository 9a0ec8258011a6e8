"""`python -m train` in processes of its own, as a user runs it."""

import json
import os
import socket
import subprocess
import sys
import time


def start(*options, num_devices=8, **environment):
    """Starts a run on so many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "train", *map(str, options)],
        env={**os.environ, "XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(*processes):
    """Waits for runs that end well, and returns what they say."""
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
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


def kill_when(condition, process):
    """Ends a run as a power cut does, as soon as the condition holds."""
    deadline = time.monotonic() + 600
    with process:
        while not condition():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
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
