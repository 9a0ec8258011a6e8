"""What a run says of errors that JAX or the operating system raises."""

import dataclasses
import errno
import os
import types

import jax
import pytest

from train import __main__, processes
from train.configs import CONFIGS


def raising(message):
    def run(config):
        raise jax.errors.JaxRuntimeError(message)

    return run


LOST = "UNAVAILABLE: Connection closed by peer.\nMore lines."
DEFECT = "INVALID_ARGUMENT: Executable expected 2 arguments."
MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nMore lines."


@pytest.mark.parametrize("count", [1, 2])
def test_too_little_memory_names_the_options(count, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    assert processes.describe(jax.errors.JaxRuntimeError(MEMORY)) == (
        "the memory of a device is not enough (RESOURCE_EXHAUSTED: Out of memory while trying to "
        "allocate 9 bytes.). A smaller --microbatch-size or --transfer-size needs less."
    )


@pytest.mark.parametrize(
    ("count", "message", "is_lost"),
    [(1, LOST, False), (2, LOST, True), (1, DEFECT, False), (2, DEFECT, False)],
)
def test_other_processes_are_not_blamed_for_defects(count, message, is_lost, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    found = processes.describe(jax.errors.JaxRuntimeError(message))
    if is_lost:
        assert found.startswith("process 0 cannot go on without the other processes, of which one")
        assert "(UNAVAILABLE: Connection closed by peer.)" in found
    else:
        assert found is None


def test_defects_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(__main__, "parse", lambda arguments: None)
    monkeypatch.setattr(__main__, "_run", raising(DEFECT))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        __main__.main()


def test_others_end_with_a_line(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(__main__, "parse", lambda arguments: None)
    monkeypatch.setattr(__main__, "_run", raising(MEMORY))
    monkeypatch.setattr(__main__.os, "_exit", codes.append)
    __main__.main()
    assert codes == [1]
    assert capsys.readouterr().err.startswith("python -m train: the memory of a device is not")


@pytest.fixture
def said_of(monkeypatch, capsys, tmp_path):
    """What the command says when training in `tmp_path` raises an error."""

    def run(error, workdir=tmp_path):
        def train(prepared):
            raise error

        config = dataclasses.replace(CONFIGS["digits"], workdir=workdir)
        prepared = types.SimpleNamespace(config=config, workdir=tmp_path)
        codes = []
        with monkeypatch.context() as patch:
            patch.setattr(__main__, "prepare", lambda config: prepared)
            patch.setattr(__main__, "train", train)
            patch.setattr(__main__.os, "_exit", codes.append)
            __main__._run(config)
        assert codes == [1]
        return capsys.readouterr().err

    return run


def refused(code, *name):
    return OSError(code, os.strerror(code), *name)


def test_what_the_system_refuses_is_named_with_what_to_do(said_of, tmp_path):
    said = said_of(refused(errno.ENOSPC, "RUN/metrics.jsonl"))

    assert said == (
        "python -m train: RUN/metrics.jsonl: No space left on device. The run ends here: free some "
        "space and start again with the same command, which begins anew, for there is no "
        "checkpoint yet.\n"
    )

    for step in (20, 120):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert said_of(refused(errno.EROFS)).endswith(
        "[Errno 30] Read-only file system. The run ends here: put that right and start again with "
        "the same command, which goes on from the checkpoint of step 120.\n"
    )
    # The folder that it was given has to be named, if it shall go on.
    assert f" the same command and --workdir {tmp_path}, which goes on" in said_of(
        refused(errno.EDQUOT), workdir=None
    )


def test_file_system_that_is_gone(said_of, monkeypatch):
    def steps_in(folder):
        raise refused(errno.EIO)

    monkeypatch.setattr(__main__, "steps_in", steps_in)

    assert said_of(refused(errno.ESTALE, "metrics.jsonl")).endswith(
        ": put that right and start again with the same command, which goes on from the last "
        "checkpoint, if there is one.\n"
    )


def test_no_room_for_the_last_words(said_of, monkeypatch):
    def print_nothing(problem):
        raise refused(errno.ENOSPC)

    monkeypatch.setattr(__main__, "_say", print_nothing)

    assert said_of(refused(errno.ENOSPC)) == ""
