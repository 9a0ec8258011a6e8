import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
from datetime import datetime

import jax
import pytest

from train import run_folder
from train.configs import CONFIGS
from train.data import DATASETS
from train.run_folder import open_run_folder

CONFIG = dataclasses.replace(CONFIGS["digits"], batch_size=240, bn_group=1)
DIGITS = DATASETS["digits"]
DEVICES = jax.local_devices()


@pytest.fixture
def begun(tmp_path):
    """The options of a run that has begun on four devices."""
    config = dataclasses.replace(CONFIG, workdir=tmp_path)
    open_run_folder(config, DIGITS, 1437, DEVICES[:4])
    return config


def test_same_run_goes_on(begun):
    before = (begun.workdir / "config.json").read_text()

    assert open_run_folder(begun, DIGITS, 1437, DEVICES[:4]) == begun.workdir
    assert (begun.workdir / "config.json").read_text() == before


# Where a run finds its data, and what it does about what goes wrong.
MAY_CHANGE = {
    *("data_dir", "coordinator", "num_processes", "process_id"),
    *("join_seconds", "checkpoint_steps", "max_bad_examples", "on_nonfinite"),
    "max_nonfinite_steps",
}


def changed(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return 2 * value + 1
        case str():
            return "lars" if value == "clars" else value + "-another"
        case None:
            return 3
        case tuple():
            return (1.0,)
        case dict():
            return {name: 2 * rate for name, rate in value.items()}
    raise AssertionError(value)


@pytest.mark.parametrize(
    "name",
    # Those two say where to go on, and whether.
    [one.name for one in dataclasses.fields(CONFIG) if one.name not in ("workdir", "resume")],
)
def test_what_may_change_between_the_parts_of_a_run(name, begun):
    other = dataclasses.replace(begun, **{name: changed(getattr(begun, name))})
    if name in MAY_CHANGE:
        assert open_run_folder(other, DIGITS, 1437, DEVICES[:4]) == begun.workdir
    else:
        with pytest.raises(ValueError, match=r"which holds a run with --\S+ .*, but now it is "):
            open_run_folder(other, DIGITS, 1437, DEVICES[:4])


def test_record_that_a_kill_has_cut_off_is_written_again(tmp_path):
    (tmp_path / ".config.json").write_text('{"config":')

    open_run_folder(dataclasses.replace(CONFIG, workdir=tmp_path), DIGITS, 1437, DEVICES)

    record = json.loads((tmp_path / "config.json").read_text())
    assert record["num_steps"] == 180  # 30 * 1,437 = 179.6 * 240
    assert not (tmp_path / ".config.json").exists()


@pytest.mark.parametrize("text", ["", '{"config":'])
def test_damaged_record_is_named(begun, text):
    (begun.workdir / "config.json").write_text(text)

    with pytest.raises(ValueError, match=r"config\.json is damaged \(.*\): name a new --workdir"):
        open_run_folder(begun, DIGITS, 1437, DEVICES[:4])


def test_other_data_are_refused(begun):
    with pytest.raises(
        ValueError, match="with a number of training examples of 1437, but now it is 999:"
    ):
        open_run_folder(begun, DIGITS, 999, DEVICES[:4])


def test_other_version_of_the_data_set_is_refused(begun):
    config = dataclasses.replace(begun, workdir=begun.workdir / "prepared")
    older, newer = (
        dataclasses.replace(DIGITS, version=f"digits/{version}") for version in ("1.0.0", "1.0.1")
    )
    open_run_folder(config, older, 1437, DEVICES[:4])

    open_run_folder(config, older, 1437, DEVICES[:4])
    with pytest.raises(
        ValueError, match=r"with the data set digits/1\.0\.0, but now it is digits/1"
    ):
        open_run_folder(config, newer, 1437, DEVICES[:4])


def test_devices_may_change_if_the_examples_of_a_batch_norm_batch_stay_as_many(begun):
    with pytest.raises(
        ValueError, match="a number of examples in a BatchNorm batch of 60, but now it is 30:"
    ):
        open_run_folder(begun, DIGITS, 1437, DEVICES)

    apart = dataclasses.replace(begun, workdir=begun.workdir / "apart", microbatch_size=15)
    for num_devices in (4, 8, 2):
        open_run_folder(apart, DIGITS, 1437, DEVICES[:num_devices])


# In a process of its own: holds the lock of the folder until it is killed.
HOLD = """
import fcntl, sys
lock = open(sys.argv[1] + "/.lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A process that has locked the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_folder_in_which_another_process_trains_is_refused(held, tmp_path):
    config = dataclasses.replace(CONFIG, workdir=tmp_path)
    with pytest.raises(ValueError, match="another process") as raised:
        open_run_folder(config, DIGITS, 1437, DEVICES)

    assert str(raised.value) == (
        f"--workdir is {tmp_path}, but another process is training in it: wait until it ends, end "
        "it, or name another folder."
    )
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    held.kill()
    held.wait()
    open_run_folder(config, DIGITS, 1437, DEVICES)


def is_locked(folder):
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_folder_stays_locked(begun):
    assert is_locked(begun.workdir)
    open_run_folder(begun, DIGITS, 1437, DEVICES[:4])  # In the same process, a run goes on.
    assert is_locked(begun.workdir)

    other = dataclasses.replace(begun, workdir=begun.workdir / "other")
    open_run_folder(other, DIGITS, 1437, DEVICES[:4])
    assert is_locked(other.workdir)
    assert not is_locked(begun.workdir)


def test_refused_run_leaves_the_folder_to_others(begun):
    with pytest.raises(ValueError, match="but now it is 999:"):
        open_run_folder(begun, DIGITS, 999, DEVICES[:4])

    assert not is_locked(begun.workdir)


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_file_system_without_locks(code, begun, monkeypatch):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)

    assert open_run_folder(begun, DIGITS, 1437, DEVICES[:4]) == begun.workdir


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls):
            return cls(2025, 1, 2, 3, 4, 5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "datetime", Clock)

    found = [str(open_run_folder(CONFIG, DIGITS, 1437, DEVICES)) for _ in range(3)]

    first = "runs/digits-20250102-030405"
    assert found == [first, f"{first}-2", f"{first}-3"]


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / "run"

    with pytest.raises(ValueError, match="cannot be made") as raised:
        open_run_folder(dataclasses.replace(CONFIG, workdir=workdir), DIGITS, 1437, DEVICES)

    assert str(raised.value) == (
        f"the run folder, {workdir}, cannot be made or written to (Not a directory): put that "
        "right, or name another one with --workdir."
    )
