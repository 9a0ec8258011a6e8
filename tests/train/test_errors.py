"""What a run says of errors that JAX raises."""

import jax
import pytest

from train import __main__, processes


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
