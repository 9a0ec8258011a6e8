"""The networks for ImageNet on eight devices: from photos on disk to accuracy."""

import pytest

from tests.train import tiny_imagenet
from tests.train.commands import finish, kill_when, lines_of, start
from train.run_folder import CHECKPOINTS

# Ten steps, with a checkpoint after every fourth, for 64 photos.
OPTIONS = (
    *("--image-size", 64, "--batch-size", 16, "--epochs", 2.5, "--bn-group", 4),
    *("--dtype", "float32"),
)


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    tiny_imagenet.write(folder)
    return folder


@pytest.fixture(scope="module")
def imagenet_dir_from_tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    tiny_imagenet.write_tars(folder)
    tiny_imagenet.prepare(folder, folder / "prepared")
    return folder / "prepared"


def start_run(name, imagenet_dir, workdir, *options, program="train"):
    options = (*OPTIONS, "--data-dir", imagenet_dir, "--workdir", workdir, *options)
    return start(f"imagenet-{name}", *options, program=program)


@pytest.mark.tensorflow
def test_a_kill_on_what_the_real_builder_wrote(imagenet_dir_from_tars, tmp_path):
    def run():
        options = ("--model", "resnet8", "--image-size", 32)
        program = "tests.train.small"
        return start_run("resnet50", imagenet_dir_from_tars, tmp_path, *options, program=program)

    kill_when(lambda: (tmp_path / CHECKPOINTS / "4").exists(), run())
    (output,) = finish(run())

    assert "going on from step 4" in output
    assert_ten_steps(output, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet50", "densenet121", "mobilenetv2"])
def test_other_networks(name, imagenet_dir, tmp_path):
    # DenseNet-121 compiles for minutes, on a busy machine for ten.
    (output,) = finish(start_run(name, imagenet_dir, tmp_path), seconds=1800)

    assert_ten_steps(output, tmp_path)


def assert_ten_steps(output, workdir):
    assert "step 10/10" in output
    assert "of 24 examples" in output
    lines = lines_of(workdir)
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 11))
    assert [line["step"] for line in lines if "test_loss" in line] == [4, 8, 10]
    for line in lines:
        # One of a thousand classes, or of eight: no step has gone astray.
        assert 0 < line.get("train_loss", 7.0) < 12
        assert all(0 < ratio < 0.1001 for ratio in line.get("trust_ratio", {}).values())
