import csv
import re
from collections import Counter
from pathlib import Path

import jax
import pytest

from benchmarks import profile
from benchmarks.hlo import sources_of
from benchmarks.profile import Kernel, kernels_in

ROOT = Path(__file__).parents[2]

# Of JAX 0.12, where its profiler's statistics become a type of Python; an error there ends Python.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")

# One CUDA graph, one kernel by itself, and a line that says both again.
GPU = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 2000000 stats { metadata_id: 1 str_value: "graph.7" } }
    events { metadata_id: 2 duration_ps: 3000000 stats { metadata_id: 1 str_value: "conv.2" } }
    events { metadata_id: 3 duration_ps: 500000 }
  }
  lines {
    name: "XLA Modules"
    events { metadata_id: 4 duration_ps: 9000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "weight_gradient_and_norms__3" } }
  event_metadata { key: 2 value { id: 2 name: "sm90_xmma_fprop_implicit_gemm" } }
  event_metadata { key: 3 value { id: 3 name: "Memset" } }
  event_metadata { key: 4 value { id: 4 name: "jit_loss_fn" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
planes {
  name: "/host:CPU"
  lines { name: "python" events { metadata_id: 1 duration_ps: 7000000 } }
  event_metadata { key: 1 value { id: 1 name: "PjitFunction" } }
}
"""


def kernels_of(text):
    return list(kernels_in(jax.profiler.ProfileData.from_text_proto(text)))


def test_streams_of_a_gpu_are_read_and_nothing_twice():
    kernels = kernels_of(GPU)

    assert [(k.kind, k.instruction, k.seconds) for k in kernels] == [
        ("our kernels", "graph.7", pytest.approx(2e-6)),
        ("products", "conv.2", pytest.approx(3e-6)),
        ("the rest", "", pytest.approx(0.5e-6)),
    ]


def test_a_profile_is_per_run():
    found = profile.Profile(0.004, kernels_of(GPU) * 2, 2, {"conv.2": "net/conv/dot"})

    assert found.cells() == ["0.0", "0.0", "0.0", "0.0", "3", "4.0"]
    assert found.rows()[0] == ("sm90_xmma_fprop_implicit_gemm", "1", "3.0")
    assert found.longest(2) == [
        ("3", "products", "sm90_xmma_fprop_implicit_gemm", "net/conv/dot"),
        ("2", "our kernels", "weight_gradient_and_norms__3", "graph.7"),
    ]


def test_kinds_of_what_an_h200_ran_are_those_of_the_table():
    """The sums of the committed kernels are the figures that stand in `benchmarks/README.md`."""
    milliseconds, numbers = Counter(), Counter()
    with (ROOT / "benchmarks/results/profile-h200/kernels.csv").open() as file:
        for row in csv.DictReader(file):
            key = row["model"], row["variant"]
            kind = Kernel(row["kernel"], "", 0.0).kind
            milliseconds[*key, kind] += float(row["microseconds"]) / 1e3
            numbers[key] += float(row["times"])

    text = (ROOT / "benchmarks/README.md").read_text()
    names = {"ResNet-50": "resnet50", "MobileNetV2": "mobilenet_v2", "ViT-S": "vit_s"}
    rows = re.findall(
        rf"^\| ({'|'.join(names)}), (plain|exact, [a-z ]+) \|(.*?)\|(.*?)\|(.*?)\|(.*?)\|(.*?)\|",
        text,
        re.MULTILINE,
    )
    assert len(rows) == len(numbers) == 7
    for name, variant, *cells in rows:
        key = names[name], variant
        kinds = [milliseconds[*key, kind] for kind in ("products", "our kernels", "the rest")]
        expected = [*(f"{time:.1f}" for time in (*kinds, sum(kinds))), f"{numbers[key]:,.0f}"]
        assert [cell.strip() or "0.0" for cell in cells] == expected


def test_a_cpu_s_threads_are_read_too(capsys, tmp_path):
    options = "--models mlp --batch-size 32 --runs 2 --top 3 --output"
    profile.main([*options.split(), str(tmp_path)])

    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    assert [row[:2] for row in rows[2:4]] == [["**mlp**", "plain"], ["", "exact"]]
    for products, ours, rest, total, kernels, wall in (map(float, row[2:]) for row in rows[2:4]):
        assert products > 0
        assert ours == 0
        assert total == pytest.approx(products + rest, abs=0.11)
        assert kernels > 5
        assert wall > 0
    longest = [row for row in rows if row[1:2] == ["products"]]
    assert any("dot_general" in row[3] for row in longest)

    with (tmp_path / "kernels.csv").open() as file:
        (header, *lines) = csv.reader(file)
    assert tuple(header) == profile.COLUMNS
    assert {line[1] for line in lines} == {"plain", "exact"}


def test_instructions_name_the_operation_that_they_come_from():
    compiled = jax.jit(lambda x: x @ x.T).lower(jax.numpy.ones((4, 4))).compile()

    assert any(source.endswith("dot_general") for source in sources_of(compiled.as_text()).values())
