"""Lint, types, and what the documents promise about each other."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import clars_optax

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command", ["ruff check .", "ruff format --check .", "mypy"], ids=lambda c: c.partition(" -")[0]
)
def test_tools_find_nothing(command):
    found = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_continuous_integration_runs_the_test_command_of_the_readme():
    (command,) = [
        line.strip()
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.strip().endswith("-m pytest")
    ]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_readme_example_runs(capsys):
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    exec(compile(code, "README.md", "exec"), {})
    losses = [float(word) for word in capsys.readouterr().out.split()]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_examples_of_the_documents_run(page, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed


def test_public_names_are_those_of_the_package():
    assert sorted(clars_optax.__all__) == clars_optax.__all__
    for name in clars_optax.__all__:
        assert getattr(clars_optax, name).__doc__


def test_the_library_needs_no_training_package():
    """`clars_optax` installs with jax, optax and chex only."""
    program = (
        "import sys, clars_optax\n"
        "found = {'flax', 'tensorflow_datasets', 'grain', 'orbax'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
