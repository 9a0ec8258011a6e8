import functools
import re

import jax
import pytest

from benchmarks import step
from train.configs import CONFIGS
from train.models import MODELS
from train.models.resnet import ResNet

pytestmark = pytest.mark.usefixtures("compiled_fast")

ARGUMENTS = "--config digits --batch-size 8 --microbatch-size 8 --rounds 2".split()


def test_table(capsys, monkeypatch):
    device = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [device])
    small = functools.partial(ResNet, stage_sizes=(1,), width=4)
    monkeypatch.setitem(MODELS, CONFIGS["digits"].model, small)

    step.main([*ARGUMENTS, "--num-norm-examples", "8", "4"])

    text = capsys.readouterr().out
    rows = re.findall(r"^\| (\w.*?) +\| +([\d,]+) +\| ([\d. ]+)", text, re.MULTILINE)
    names = [name for name, _, _ in rows]
    assert names == ["lars", "clars, 8 norms", "clars, 4 norms", "lars, again"]
    assert all(float(speed.replace(",", "")) > 0 for _, speed, _ in rows)
    assert rows[0][2].strip() == ""
    assert all(float(ratio) > 0 for _, _, ratio in rows[1:])
    assert jax.__version__ in text


def test_the_steps_differ_in_optimizer_and_norms_alone():
    lars, exact, some = step.configs_of(CONFIGS["imagenet-resnet50"], [16_384, 512]).values()

    assert (lars.optimizer, exact.optimizer, some.optimizer) == ("lars", "clars", "clars")
    assert (exact.num_norm_examples, some.num_norm_examples) == (16_384, 512)
    assert {c.batch_size for c in (lars, exact, some)} == {16_384}
    assert {c.model for c in (lars, exact, some)} == {"resnet50"}


def test_options_that_do_not_fit_are_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(step, "Steps", None)

    with pytest.raises(ValueError, match="--num-norm-examples"):
        step.main([*ARGUMENTS, "--num-norm-examples", "9"])
