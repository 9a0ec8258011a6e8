import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from train import metrics
from train.errors import RunError


def test_a_line_for_each_step_and_events_beside_them(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train_loss": 2.5, "trust_ratio": {"head/kernel": 0.5}})
        writer.write(2, {"train_loss": 1.5})

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "train_loss": 2.5, "trust_ratio": {"head/kernel": 0.5}},
        {"step": 2, "train_loss": 1.5},
    ]
    assert metrics.read(tmp_path)[1] == {"step": 2, "train_loss": 1.5}
    (events,) = tmp_path.glob("events.*")
    assert b"trust_ratio/head/kernel" in events.read_bytes()


def test_lines_are_there_while_the_run_goes_on(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train_loss": 2.5})
        assert len(metrics.read(tmp_path)) == 1


def crc32c(data):
    """The checksum of iSCSI, bit by bit."""
    found = 0xFFFFFFFF
    for byte in data:
        found ^= byte
        for _ in range(8):
            found = found >> 1 ^ (0x82F63B78 if found & 1 else 0)
    return found ^ 0xFFFFFFFF


def events_in(path):
    """Reads TFRecord's frames, as TensorBoard does, and checks them."""
    contents = path.read_bytes()
    while contents:
        parts = []
        for size in (8, struct.unpack("<Q", contents[:8])[0]):
            parts.append(contents[:size])
            (found,) = struct.unpack("<I", contents[size : size + 4])
            expected = crc32c(parts[-1])
            assert found == ((expected >> 15 | expected << 17) + 0xA282EAD8) % 2**32
            contents = contents[size + 4 :]
        yield Event.FromString(parts[-1])


def scalars_of(event):
    return {value.tag: value.simple_value for value in event.summary.value}


def test_events_are_there_while_the_run_goes_on(tmp_path):
    assert crc32c(b"123456789") == 0xE3069283

    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train_loss": 2.5, "trust_ratio": {"head/kernel": 0.5}})
        writer.write(2, {"train_loss": float("nan"), "test_loss": 1.5})
        (path,) = tmp_path.glob("*tfevents*")
        version, start, *steps = events_in(path)

    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (1, SessionLog.START)
    assert [(event.step, scalars_of(event)) for event in steps] == [
        (1, {"train_loss": 2.5, "trust_ratio/head/kernel": 0.5}),
        (2, {"test_loss": 1.5}),
    ]


def test_run_that_goes_on_has_events_of_its_own(tmp_path):
    for done in (0, 1):
        with metrics.MetricsWriter(tmp_path, done) as writer:
            for step in (done + 1, done + 2):
                writer.write(step, {"train_loss": 2.5})

    _, second = sorted(tmp_path.glob("*tfevents*"))
    _, start, *steps = events_in(second)
    # TensorBoard does not show what was written before from this step on.
    assert (start.step, start.session_log.status) == (2, SessionLog.START)
    assert [event.step for event in steps] == [2, 3]


def test_record_that_is_missing_is_noticed(tmp_path, capsys):
    metrics.MetricsWriter(tmp_path).__exit__()
    assert capsys.readouterr().out == ""

    (tmp_path / "metrics.jsonl").unlink()
    with metrics.MetricsWriter(tmp_path, done=5) as writer:
        writer.write(6, {"train_loss": 2.5})

    assert capsys.readouterr().out == (
        f"{tmp_path}/metrics.jsonl is missing: the record of the run begins after step 5.\n"
    )
    assert metrics.read(tmp_path) == [{"step": 6, "train_loss": 2.5}]


def test_interrupted_run_keeps_its_lines(tmp_path):
    def interrupted():
        with metrics.MetricsWriter(tmp_path) as writer:
            writer.write(1, {"train_loss": 2.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert metrics.read(tmp_path) == [{"step": 1, "train_loss": 2.5}]


def test_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step":\n{"step": 3}\n{"st')

    with pytest.raises(
        RunError, match=r"metrics\.jsonl is damaged in line 2 .*: take that line out"
    ):
        metrics.read(tmp_path)
