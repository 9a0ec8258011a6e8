"""A run folder that has no room left, or in which another run is under way."""

import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest

from tests.train.commands import (
    finish,
    lines_of,
    refusals,
    start,
    start_two,
    wait_for_step,
)

pytestmark = pytest.mark.faults

# In a process of its own: writes one step after another until the system refuses it.
WRITE_IN_A_LOOP = """
import json, pathlib, resource, sys
from train.metrics import MetricsWriter

resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
folder, metrics = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
try:
    with MetricsWriter(folder) as writer:
        for step in range(1, 10_000):
            writer.write(step, metrics)
except OSError as error:
    print(step, error)
"""


@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        # Of many digits the record has all, of few numbers the events have more around them.
        ({"loss": 0.1234567890123456, "accuracy": 0.1234567890123456}, r"metrics\.jsonl"),
        ({"a": 1.0}, r"events\.out\.tfevents\.\d+"),
    ],
    ids=["record", "events"],
)
def test_no_room_ends_the_record_with_the_name_of_the_file(metrics, name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WRITE_IN_A_LOOP, tmp_path, json.dumps(metrics)],
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert done.stderr == ""
    found = re.fullmatch(rf"(\d+) \[Errno 27\] File too large: '{tmp_path}/{name}'\n", done.stdout)
    assert found, done.stdout
    # What was written before is whole.
    assert lines_of(tmp_path)[int(found[1]) - 2] == {"step": int(found[1]) - 1, **metrics}


OPTIONS = (
    *("digits", "--batch-size", 288, "--epochs", 20, "--eval-epochs", 20, "--seed", 4),
    *("--num-norm-examples", 32, "--optimizer", "clars"),
)


@pytest.fixture(scope="module")
def run(data_dir):
    return lambda workdir, *options: start(
        *(*OPTIONS, *options, "--workdir", workdir, "--data-dir", data_dir),
        num_devices=2,
        program="tests.train.small",
    )


def test_no_room_ends_the_run_with_one_line(run, tmp_path):
    process = run(tmp_path)
    wait_for_step(1, tmp_path, process)
    # Room for a few steps more.
    size = (tmp_path / "metrics.jsonl").stat().st_size + 1000
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    try:
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()

    assert process.returncode == 1
    assert re.fullmatch(
        rf"python -m train: {tmp_path}/(metrics\.jsonl|events\.\S+): File too large\. The run ends "
        r"here: put that right and start again with the same command, which begins anew, for there "
        r"is no checkpoint yet\.\n",
        errors,
    )

    finish(run(tmp_path))
    assert [line["step"] for line in lines_of(tmp_path)] == [*range(1, 101), 100]


def test_second_start_leaves_the_first_run_alone(run, data_dir, tmp_path):
    first = run(tmp_path)
    wait_for_step(1, tmp_path, first)
    # Lest it ends while the others start.
    os.kill(first.pid, signal.SIGSTOP)
    second = run(tmp_path)
    both = start_two(*2 * [(*OPTIONS, "--workdir", tmp_path, "--data-dir", data_dir)])

    refusal = (
        f"--workdir is {tmp_path}, but another process is training in it: wait until it ends, end "
        "it, or name another folder."
    )
    try:
        assert refusals(second) == [refusal]
        assert refusals(*both) == [
            refusal,
            "process 0 refuses to start: its message says why.",
        ]
    finally:
        os.kill(first.pid, signal.SIGCONT)
    finish(first)
    assert [line["step"] for line in lines_of(tmp_path)] == [*range(1, 101), 100]
