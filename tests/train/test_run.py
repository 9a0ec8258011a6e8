import json
import subprocess

import numpy as np
import pytest
from matplotlib import image

from tests.train.commands import lines_of, start
from train.__main__ import main
from train.checkpoint import Checkpoints
from train.configs import CONFIGS

WEIGHTS = {"stem_conv/kernel", "head/kernel"}  # Of the small network.

SHORT = (
    *("--epochs", 2, "--batch-size", 960, "--group-size", 4, "--num-norm-examples", 64),
    *("--optimizer", "clars", "--seed", 3),
)


def train(*options, num_devices=8, program="tests.train.small"):
    process = start(*options, num_devices=num_devices, program=program)
    output, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("runs") / "short"
    done = train(*SHORT, "--workdir", workdir, "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_output_without_a_terminal(short_run):
    workdir, done = short_run

    assert "step 3/3" in done.stdout
    assert "held-out accuracy: " in done.stdout
    assert done.stdout.endswith(f"run folder: {workdir}\n")
    assert "\x1b" not in done.stdout


def test_configuration_is_recorded(short_run):
    record = json.loads((short_run[0] / "config.json").read_text())

    assert record["batch_size"] == 960
    assert record["group_size"] == 4
    assert record["num_norm_examples"] == 64
    assert record["seed"] == 3
    assert record["learning_rate"] == CONFIGS["digits"].learning_rates["clars"]
    assert record["peak_learning_rate"] == record["learning_rate"] * 960 / 256
    assert len(record["devices"]) == 8
    assert {"jax", "flax", "optax"} <= set(record["versions"])


def test_metrics_are_recorded(short_run):
    lines = lines_of(short_run[0])
    training = [line for line in lines if "train_loss" in line]
    evaluations = [line for line in lines if "test_loss" in line]

    assert [line["step"] for line in training] == [1, 2, 3]
    assert [line["step"] for line in evaluations] == [2, 3]  # The first pass ends in step 2.
    assert all(line["epoch"] == line["step"] * 960 / 1437 for line in lines)
    rates = [line["learning_rate"] / training[0]["learning_rate"] for line in training]
    np.testing.assert_allclose(rates, [1, (2 / 3) ** 2, (1 / 3) ** 2], rtol=1e-5)
    for line in training:
        assert set(line["trust_ratio"]) == set(line["variance_factor"]) == WEIGHTS
        assert all(0 < ratio <= 0.1001 for ratio in line["trust_ratio"].values())
    for line in evaluations:
        found = line["test_accuracy"] * 360
        assert found == pytest.approx(round(found), abs=1e-6)


def test_curves_are_drawn(short_run):
    pixels = image.imread(short_run[0] / "curves.png")

    assert pixels.shape[:2] == (800, 1200)
    assert pixels[..., :3].std() > 0.05


def test_tensorboard_events(short_run):
    (events,) = short_run[0].glob("events.*")

    assert b"trust_ratio/head/kernel" in events.read_bytes()


def test_checkpoint_is_that_of_the_last_step(short_run):
    with Checkpoints(short_run[0] / "checkpoints") as checkpoints:
        assert checkpoints.steps()[-1] == 3


@pytest.fixture
def refusal(data_dir, monkeypatch, capsys):
    """What the command says in this process, for others take seconds to start."""

    def run(workdir, *options):
        before = lines_of(workdir)
        options = ("train", "--workdir", workdir, "--data-dir", data_dir, *options)
        monkeypatch.setattr("sys.argv", [*map(str, options)])
        with pytest.raises(SystemExit) as info:
            main()
        assert info.value.code == 2
        assert lines_of(workdir) == before
        return capsys.readouterr().err

    return run


def test_run_folder_of_another_run_is_refused(short_run, refusal):
    assert refusal(short_run[0], "--epochs", 2) == (
        f"python -m train: --workdir is {short_run[0]}, which holds a run with --batch-size 960, "
        "but now it is 720: name a new folder, or let the run go on as it began.\n"
    )


def test_used_run_folder_is_refused_where_no_run_shall_go_on(short_run, refusal):
    assert refusal(short_run[0], "--resume", "never") == (
        f"python -m train: --workdir is {short_run[0]}, but that folder is not empty: name a new "
        "one, remove it, or let the run in it go on with --resume auto.\n"
    )


def test_folder_that_holds_something_else_is_refused(tmp_path, refusal):
    (tmp_path / "thesis.tex").touch()

    assert "holds no config.json of a run" in refusal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_network_that_is_too_large_for_the_images_is_refused(tmp_path, refusal):
    workdir = tmp_path / "run"

    message = refusal(workdir, "--model", "densenet121")

    assert "--image-size is too small for this network: transition" in message
    assert not workdir.exists()


def test_run_that_is_at_its_end_stays_as_it_is(short_run, data_dir):
    workdir, first = short_run
    before = lines_of(workdir)

    done = train(*SHORT, "--workdir", workdir, "--data-dir", data_dir)

    assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stdout
    assert done.stdout.splitlines()[-2:] == first.stdout.splitlines()[-2:]
    assert lines_of(workdir) == before


def test_first_run_finds_97_percent(tmp_path, data_dir):
    # On one device, as for whoever comes here.
    options = ("--workdir", tmp_path / "run", "--data-dir", data_dir)
    done = train(*options, num_devices=1, program="train")

    assert done.returncode == 0, done.stderr
    assert lines_of(tmp_path / "run")[-1]["test_accuracy"] >= 0.97
