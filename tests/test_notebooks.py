"""The notebook runs from top to bottom, prints what its text says, and agrees with its script."""

import json
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the notebook prints in a kernel of this interpreter that has the root on its path."""
    tmp = tmp_path_factory.mktemp("jupyter")
    spec = tmp / "kernels" / "this_interpreter" / "kernel.json"
    spec.parent.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": launch, "display_name": "this", "language": "python"}))
    notebook = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(tmp))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(tmp / "runtime"))
        patch.setenv("IPYTHONDIR", str(tmp / "ipython"))
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.delenv("MPLBACKEND", raising=False)
        patch.delenv("XLA_FLAGS", raising=False)  # the reader has one device, not eight
        NotebookClient(
            notebook,
            kernel_name="this_interpreter",
            timeout=300,
            resources={"metadata": {"path": str(tmp)}},
        ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def test_held_out_accuracy_is_what_the_text_promises(printed):
    text = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    (promise,) = re.findall(r"held-out accuracy is at least (\d+) %", text)
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


def test_pair_is_in_sync():
    script = jupytext.read(NOTEBOOK.with_suffix(".py"))
    notebook = jupytext.read(NOTEBOOK)

    def cells(nb):
        return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in nb.cells]

    assert cells(notebook) == cells(script)


def test_committed_notebook_has_no_outputs():
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
