"""The notebooks run from top to bottom, print what they promise, and agree with their scripts."""

import json
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.train import idx

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
of_every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def text_of(name):
    cells = read(ROOT / "notebooks" / f"{name}.ipynb").cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def run(name, folder, num_pictures, **environment):
    """Runs a notebook in a kernel of this interpreter that has the root on its path.

    Returns what it prints.
    """
    spec = folder / "kernels" / "this_interpreter" / "kernel.json"
    spec.parent.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": launch, "display_name": "this", "language": "python"}))
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.delenv("MPLBACKEND", raising=False)
        patch.delenv("XLA_FLAGS", raising=False)  # the reader has one device, not eight
        for variable, value in environment.items():
            patch.setenv(variable, value)
        NotebookClient(
            notebook,
            kernel_name="this_interpreter",
            timeout=300,
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == num_pictures
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the quickstart prints."""
    return run("quickstart", tmp_path_factory.mktemp("jupyter"), num_pictures=2)


def test_held_out_accuracy_is_what_the_text_promises(printed):
    (promise,) = re.findall(r"held-out accuracy is at least (\d+) %", text_of("quickstart"))
    (accuracy,) = re.findall(r"held-out accuracy: ([\d.]+)%", printed)
    assert float(accuracy) >= float(promise)


def test_denominators_and_first_ratios_are_what_the_text_promises(printed):
    number = r" +([\d.]+)"
    rows = re.findall(rf"^\w+/kernel{number * 4}$", printed, re.MULTILINE)
    assert len(rows) == 4
    for smallest, largest, clars_ratio, lars_ratio in (map(float, row) for row in rows):
        assert smallest > 1
        assert largest > 10
        assert 0.009 < clars_ratio < 0.026
        assert lars_ratio == 0.1


@pytest.mark.long
def test_study_is_drawn_and_a_row_of_it_trained_again(tmp_path):
    splits = {"train": idx.enlarged_digits(6096), "test": idx.enlarged_digits(500)}
    idx.write(tmp_path / "data" / "fashion-mnist", splits)
    data_dir = str(tmp_path / "data")
    printed = run(
        "compare_optimizers", tmp_path / "jupyter", num_pictures=3, TFDS_DATA_DIR=data_dir
    )
    assert "python -m benchmarks.convergence --preset cpu;" in printed
    again, in_table = re.findall(r": ([\d.]+)% \([\d.]+%-[\d.]+%\) of the test images", printed)
    assert float(again) > 15  # one class in ten: it learns, although other images
    assert in_table == "52.7"  # as README says


@pytest.mark.long
def test_warmup_is_explained_as_the_text_says(tmp_path):
    printed = run("why_no_warmup", tmp_path / "jupyter", num_pictures=3)
    number = r" +(-?[\d.]+)"

    def numbers(label, count):
        (row,) = re.findall(rf"^{label}{number * count}$", printed, re.MULTILINE)
        return list(map(float, row))

    assert min(numbers("SGD", 3)) > 2.2
    for way in ("SGD, warm-up", "SGD, last layer frozen", "LARS", "CLARS"):
        assert max(numbers(way, 3)) < 0.1
    first, last = re.findall(r"loss ([\d.]+) at first, ([\d.]+) at last", printed)[0]
    assert float(last) < 0.1 < float(first)
    for layer, share in (("stem_conv", 1 / 4), ("head", 1 / 10)):
        first, _, sixth = numbers(f"ResNet-8 +{layer}", 3)
        assert sixth < share * first
    for rule in ("LARS", "CLARS"):
        assert min(numbers(rule, 6)) > 0.6


@of_every_notebook
def test_pair_is_in_sync(path):
    script = jupytext.read(path.with_suffix(".py"))
    notebook = jupytext.read(path)

    def cells(nb):
        return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in nb.cells]

    assert cells(notebook) == cells(script)


@of_every_notebook
def test_committed_notebook_has_no_outputs(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


@of_every_notebook
def test_notebook_opens_in_colab(path):
    url = "https://colab.research.google.com/github/clars-optax/clars_optax/blob/main/notebooks/"
    assert f"{url}{path.name})" in text_of(path.stem)
    assert ["skip-execution"] in [cell.metadata.get("tags") for cell in read(path).cells]
