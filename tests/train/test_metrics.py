import json

import pytest

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
