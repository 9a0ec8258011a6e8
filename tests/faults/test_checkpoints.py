"""Checkpoints that are damaged, foreign, half written, or that the disk has no room for."""

import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.commands import free_port
from train.checkpoint import Checkpoints
from train.errors import RunError
from train.state import TrainState

pytestmark = [
    pytest.mark.faults,
    # Where an array cannot be written, Orbax closes the event loop that the others report to.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# In a process of its own: saves one step after another, and says which are on the disk.
SAVE_IN_A_LOOP = """
import pathlib, sys
from tests.faults.test_checkpoints import new_state
from train.checkpoint import Checkpoints

sys.stdin.readline()
with Checkpoints(pathlib.Path(sys.argv[1])) as checkpoints:
    found = checkpoints.restore(new_state(0), print)
    step = int(found[0].step) if found else 0
    while True:
        # Each one is saved twice, as where a run is interrupted before an evaluation.
        step += 1
        checkpoints.save(new_state(step), {})
        checkpoints.save(new_state(step), {"test_accuracy": 1 / step})
        print(step, flush=True)
"""
# In two processes: restores, saves, and says what came of it.
RESTORE_TOGETHER = """
import contextlib, pathlib, sys
import jax
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
from tests.faults.test_checkpoints import new_state, small_files
from train.checkpoint import Checkpoints
from train.errors import RunError

try:
    with Checkpoints(pathlib.Path(sys.argv[1])) as checkpoints:
        state, evaluation = checkpoints.restore(new_state(0), print)
        print(int(state.step), float(state.params["kernel"].sum()), evaluation)
        checkpoints.save(state.replace(step=state.step + 1), {})
        checkpoints.wait()
        print(checkpoints.steps())
        # Only the first process writes.
        block = small_files(sys.argv[1]) if jax.process_index() == 0 else contextlib.nullcontext()
        with block:
            checkpoints.save(state.replace(step=state.step + 2), {})
            checkpoints.wait()
except RunError as error:
    print(error)
"""


def new_state(step, params=None, tx=None, **options):
    """A state whose arrays tell its step; large enough for a kill to meet its writing."""
    if params is None:
        params = {
            "kernel": np.random.default_rng(step).normal(size=(300, 301)).astype(np.float32),
            "scale": jnp.full(3, step, jnp.bfloat16),
        }
    state = TrainState.create(
        apply_fn=None,
        params=params,
        tx=tx or optax.sgd(0.1, momentum=0.9),
        batch_stats={"mean": jnp.full(3, step, jnp.float32)},
        **options,
    )
    return state.replace(step=jnp.int32(step))


def assert_is_of_step(state, step):
    expected = new_state(step)
    for leaf, expected_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf, strict=True)


def evaluation_of(step):
    return {"test_loss": 1.5, "test_accuracy": 1 / step}


def save_steps(folder, *steps):
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            checkpoints.save(new_state(step), evaluation_of(step))


def restore(folder, state=None):
    """Restores, and returns what was said of damaged ones, too."""
    said = []
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(state or new_state(0), said.append)
    return found, said


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in files_in(folder)}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Checkpoints of the steps 20 and 40; not to be written to."""
    folder = tmp_path_factory.mktemp("two_steps") / "checkpoints"
    save_steps(folder, 20, 40)
    return folder


@pytest.fixture
def folder(two_steps, tmp_path):
    """A copy of these checkpoints."""
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def flip(path, position):
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1 << position % 8
    path.write_bytes(contents)


def grow(path):
    with path.open("ab") as file:
        file.write(b"\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"([\d,]+ bytes instead of [\d,]+|other contents)"),
        (empty, r"(0 bytes instead of [\d,]+|other contents)"),
        (grow, r"([\d,]+ bytes instead of [\d,]+|other contents)"),
        (os.remove, "No such file or directory"),
    ],
)
def test_every_file_counts(spoil, message, folder):
    whole = shutil.copytree(folder, folder.parent / "whole")
    names = [path.relative_to(folder) for path in files_in(folder / "40")]
    assert len(names) > 5

    for name in names:
        spoil(folder / name)
        (state, evaluation), (line,) = restore(folder)

        assert_is_of_step(state, 20)
        assert evaluation == evaluation_of(20)
        assert re.fullmatch(
            rf"checkpoint 40 is damaged \(checkpoints/{name}: {message}\): "
            "skipped for the one before it",
            line,
        )
        assert (folder / "40").exists()
        shutil.copy(whole / name, folder / name)
    assert_is_of_step(restore(folder)[0][0], 40)


def test_flipped_bits_are_noticed(folder):
    random_positions = random.Random(0)

    for path in files_in(folder / "40"):
        whole = path.read_bytes()
        last = len(whole) - 1
        for position in {0, 1, last // 2, last - 1, last, random_positions.randint(0, last)}:
            flip(path, position)
            (state, _), lines = restore(folder)

            assert int(state.step) == 20
            assert len(lines) == 1
            path.write_bytes(whole)


def test_every_byte_of_the_checksums_counts(tmp_path):
    save_steps(tmp_path, 1)
    path = tmp_path / "1" / "checksums.txt"
    whole, state = path.read_bytes(), new_state(0)

    with Checkpoints(tmp_path) as checkpoints:
        for position in range(len(whole)):
            flip(path, position)
            with pytest.raises(RunError, match="no checkpoint in"):
                checkpoints.restore(state, pytest.fail)
            path.write_bytes(whole)
        assert checkpoints.restore(state, pytest.fail) is not None


def test_message_names_the_file_and_its_size(folder):
    path = max(files_in(folder / "40"), key=lambda path: path.stat().st_size)
    size = path.stat().st_size
    os.truncate(path, 4096)

    _, lines = restore(folder)

    assert lines == [
        f"checkpoint 40 is damaged (checkpoints/{path.relative_to(folder)}: 4,096 bytes instead "
        f"of {size:,}): skipped for the one before it"
    ]


def test_several_damaged_ones_are_skipped(folder):
    save_steps(folder, 60, 80)
    for step in (40, 60, 80):
        (folder / str(step) / "evaluation.json").unlink()

    (state, _), lines = restore(folder)

    assert_is_of_step(state, 20)
    assert [line.split()[1] for line in lines] == ["80", "60", "40"]


def test_nothing_is_said_of_damaged_ones_before_the_newest(folder):
    empty(folder / "20" / "evaluation.json")

    (state, _), lines = restore(folder)

    assert_is_of_step(state, 40)
    assert lines == []


def test_none_is_whole(folder):
    path = folder / "20" / "evaluation.json"
    size = path.stat().st_size
    empty(path)
    (folder / "40" / "checksums.txt").unlink()
    before = contents_of(folder)

    with pytest.raises(RunError, match="whole") as raised:
        restore(folder)

    assert str(raised.value) == (
        f"no checkpoint in {folder} is whole (checkpoints/20/evaluation.json: 0 bytes instead of "
        f"{size}, checkpoints/40/checksums.txt: No such file or directory): restore one of them "
        "from a copy, or name a new --workdir."
    )
    assert contents_of(folder) == before


PARAMS = new_state(20).params


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (
            {"params": {**PARAMS, "kernel": jnp.ones((7, 7, 3, 64))}},
            "params/kernel: (300, 301) float32 there, (7, 7, 3, 64) float32 here",
        ),
        (
            {"params": {**PARAMS, "kernel": PARAMS["kernel"].astype(jnp.bfloat16)}},
            "params/kernel: (300, 301) float32 there, (300, 301) bfloat16 here",
        ),
        (
            {"params": {**PARAMS, "bias": jnp.ones(3), "offset": jnp.ones(3)}},
            "params/bias: nothing there, (3,) float32 here",
        ),
        (
            {"params": {"kernel": PARAMS["kernel"]}},
            "opt_state/0/trace/scale: (3,) bfloat16 there, nothing here",
        ),
        (
            {"tx": optax.adam(0.1)},
            "opt_state/0/count: nothing there, () int32 here",
        ),
        (
            {"tx": optax.sgd(0.1)},
            "opt_state/0/trace/kernel: (300, 301) float32 there, nothing here",
        ),
        (
            {"ema": {"params": PARAMS}, "ema_decay": 0.5},
            "ema/params/kernel: nothing there, (300, 301) float32 here",
        ),
    ],
)
def test_checkpoint_of_something_else_is_refused(options, difference, two_steps):
    before = contents_of(two_steps)

    with pytest.raises(RunError, match="another model or optimizer") as raised:
        restore(two_steps, new_state(0, **options))

    assert str(raised.value) == (
        f"{two_steps}/40 is a checkpoint of another model or optimizer ({difference}): go on with "
        "the options that it began with, or name a new --workdir."
    )
    assert contents_of(two_steps) == before


def test_step_is_saved_over_a_damaged_one(folder):
    empty(folder / "40" / "evaluation.json")

    with Checkpoints(folder) as checkpoints:
        checkpoints.restore(new_state(0), str)
        # It stays until there is a newer whole one.
        checkpoints.save(new_state(30), {})
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30, 40]
        checkpoints.save(new_state(40), evaluation_of(40))
    (state, evaluation), lines = restore(folder)

    assert lines == []
    assert_is_of_step(state, 40)
    assert evaluation == evaluation_of(40)
    # The best one, and the last two.
    assert sorted(path.name for path in folder.iterdir()) == ["20", "30", "40"]


def test_damaged_one_goes_when_there_is_a_newer_one(folder):
    empty(folder / "40" / "evaluation.json")

    with Checkpoints(folder) as checkpoints:
        checkpoints.restore(new_state(0), str)
        checkpoints.save(new_state(50), {})

    assert sorted(path.name for path in folder.iterdir()) == ["20", "50"]


def leave_nothing_but_a_folder(folder):
    (folder / "unfinished.1").mkdir()


def leave_what_orbax_began(folder):
    shutil.copytree(folder / "40" / "state", folder / "unfinished.1" / "state.orbax-checkpoint-tmp")
    (folder / "unfinished.1" / "state.orbax-checkpoint-tmp" / "_METADATA").unlink()


def leave_what_orbax_finished(folder):
    shutil.copytree(folder / "40" / "state", folder / "unfinished.1" / "state")


def leave_all_but_the_name(folder):
    shutil.copytree(folder / "40", folder / "unfinished.1")


def leave_the_replaced_one_without_the_new_one(folder):
    leave_all_but_the_name(folder)
    (folder / "40").rename(folder / "40.replaced")


def leave_the_replaced_one_beside_the_new_one(folder):
    shutil.copytree(folder / "40", folder / "40.replaced")
    empty(folder / "40.replaced" / "evaluation.json")


@pytest.mark.parametrize(
    "leave",
    [
        leave_nothing_but_a_folder,
        leave_what_orbax_began,
        leave_what_orbax_finished,
        leave_all_but_the_name,
        leave_the_replaced_one_without_the_new_one,
        leave_the_replaced_one_beside_the_new_one,
    ],
)
@pytest.mark.parametrize("next_step", [40, 60])
def test_what_a_kill_leaves(leave, next_step, folder):
    leave(folder)

    with Checkpoints(folder) as checkpoints:
        state, _ = checkpoints.restore(new_state(0), pytest.fail)
        assert_is_of_step(state, 40)
        checkpoints.save(new_state(next_step), {})
    (state, _), lines = restore(folder)

    assert lines == []
    assert_is_of_step(state, next_step)
    names = {"20", "40", str(next_step)}
    assert {path.name for path in folder.iterdir()} == names


def test_kill_during_the_first_checkpoint(tmp_path):
    (tmp_path / "unfinished.1" / "state.orbax-checkpoint-tmp").mkdir(parents=True)

    assert restore(tmp_path) == (None, [])
    save_steps(tmp_path, 20)

    assert_is_of_step(restore(tmp_path)[0][0], 20)


def start(program, *arguments):
    """Starts a program with one CPU device."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kills_at_random_moments(tmp_path):
    moments = random.Random(0)
    done = 0
    # One starts up while another is at work.
    following = start(SAVE_IN_A_LOOP, tmp_path)
    for attempt in range(10):
        process, following = following, start(SAVE_IN_A_LOOP, tmp_path) if attempt < 9 else None
        process.stdin.write("\n")
        process.stdin.flush()
        first = process.stdout.readline()
        try:
            process.wait(moments.uniform(0, 0.2))
        except subprocess.TimeoutExpired:
            process.kill()
        output, errors = process.communicate()
        assert process.returncode == -9, errors

        (state, _), lines = restore(tmp_path)

        assert "damaged" not in first + output
        assert lines == []
        said = int((first + output).split("\n")[-2])
        # Of a step that it has said there may be the checkpoint without the evaluation alone.
        assert int(state.step) >= said > done
        done = int(state.step)
        assert_is_of_step(state, done)
        with Checkpoints(tmp_path) as checkpoints:
            # One more where a kill came before the oldest was removed, and the best.
            assert 2 <= len(checkpoints.steps()) <= 4 or done == 1


@contextlib.contextmanager
def full_disk(folder):
    """Leaves less room than a checkpoint needs."""
    filler = folder.parent / "filler"
    disk = os.statvfs(folder)
    filler.write_bytes(bytes(disk.f_bavail * disk.f_bsize - 100_000))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def small_files(folder):
    """Has the system refuse larger files than a checkpoint needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["small disk", "small files"])
def no_room(request, two_steps, tmp_path):
    """Two checkpoints, a block in which there is no room for another, and the message."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    block, reason = small_files, "File too large. {}: put that right"
    with contextlib.ExitStack() as stack:
        is_small_disk = request.param == "small disk"
        # Where mounting is not permitted, the system's limit has to do.
        if is_small_disk and subprocess.run(mount, capture_output=True).returncode == 0:
            stack.callback(subprocess.run, ["umount", "--lazy", disk], check=True)
            block, reason = full_disk, "No space left on device. {}: free some space"
        folder = shutil.copytree(two_steps, disk / "checkpoints")
        yield (
            folder,
            block,
            f"checkpoint {{}} could not be written to {folder}: {reason} and start again with the "
            "same command.",
        )


@pytest.mark.parametrize(
    "notice",
    [
        lambda checkpoints: checkpoints.wait(),
        lambda checkpoints: checkpoints.save(new_state(80), {}),
        lambda checkpoints: None,
    ],
    ids=["wait", "save", "exit"],
)
def test_no_room(notice, no_room, caplog):
    folder, block, message = no_room
    before = [contents_of(folder / step) for step in ("20", "40")]

    def save():
        with Checkpoints(folder) as checkpoints:
            checkpoints.restore(new_state(0), pytest.fail)
            checkpoints.save(new_state(60), {})
            notice(checkpoints)

    with block(folder):
        with pytest.raises(RunError, match="checkpoint 60") as raised:
            save()
        assert str(raised.value) == message.format(
            60, "The checkpoints of steps 20 and 40 are whole"
        )
        assert [contents_of(folder / step) for step in ("20", "40")] == before
        (state, _), lines = restore(folder)
        assert lines == []
        assert_is_of_step(state, 40)

    assert caplog.text == ""
    save_steps(folder, 60)
    assert_is_of_step(restore(folder)[0][0], 60)


def test_no_room_for_the_first_one(no_room):
    folder, block, message = no_room
    for step in (20, 40):
        shutil.rmtree(folder / str(step))

    with block(folder), pytest.raises(RunError, match="checkpoint 20") as raised:
        save_steps(folder, 20)

    assert str(raised.value) == message.format(20, "There is none before it")
    assert restore(folder) == (None, [])


def test_error_of_the_block_comes_first(folder):
    def save_and_fail():
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(new_state(60), {})
            raise KeyError

    with small_files(folder), pytest.raises(KeyError) as raised:
        save_and_fail()

    (note,) = raised.value.__notes__
    assert note.startswith(f"checkpoint 60 could not be written to {folder}: File too large.")


def test_mistake_in_the_program_is_not_blamed_on_the_disk(folder):
    state = new_state(60, params={"kernel": jnp.ones((0, 3))})

    with pytest.raises(ValueError, match="zero size"), Checkpoints(folder) as checkpoints:
        checkpoints.save(state, {})


def test_processes_agree(folder):
    name = max(files_in(folder / "40"), key=lambda path: path.stat().st_size)
    truncate(name)
    address = f"127.0.0.1:{free_port()}"
    processes = [start(RESTORE_TOGETHER, folder, address, index) for index in range(2)]

    outputs = [process.communicate(timeout=120) for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    lines, lines_of_second = (
        [line for line in output.splitlines() if not line.startswith("[Gloo]")]
        for output, _ in outputs
    )
    assert lines_of_second == lines
    assert lines[0].startswith(f"checkpoint 40 is damaged (checkpoints/{name.relative_to(folder)}:")
    kernel = new_state(20).params["kernel"]
    assert lines[1] == f"20 {float(kernel.sum())} {evaluation_of(20)}"
    assert lines[2] == "[20, 21, 40]"
    assert lines[3].startswith(
        f"checkpoint 22 could not be written to {folder}: File too large. "
        "The checkpoints of steps 20 and 21 are whole"
    )
