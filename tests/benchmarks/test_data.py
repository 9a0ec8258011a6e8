import re
import sys
import textwrap

import pytest

from benchmarks import data
from tests.train import tiny_imagenet

SMALL = ["--photos", "16", "--image-size", "32", "--batch-size", "4", "--batches", "2"]


def test_table_without_tensorflow(capsys):
    data.main([*SMALL, "--pairs", "2"])

    output = capsys.readouterr()
    assert re.findall(
        r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \|  \|  \|  \|$", output.out, re.MULTILINE
    )
    assert "TensorFlow is not there: install '.[imagenet]'" in output.err


def test_photos_are_handed_to_the_other_side(tmp_path, capsys):
    """A stand-in for the environment with TensorFlow: it takes half a second for a photo."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        textwrap.dedent(f"""\
            #!{sys.executable}
            import pathlib, sys
            _, option, module, folder, *sizes = sys.argv
            assert (option, module, sizes) == ("-m", "benchmarks.data_tensorflow", ["4", "32", "2"])
            for split in ("train", "eval"):
                photos = [path.read_bytes() for path in (pathlib.Path(folder) / split).iterdir()]
                assert len(photos) == 16
                assert all(photo.startswith(b"\\xff\\xd8") for photo in photos)
            print("2.99", flush=True)
            for line in sys.stdin:
                assert line in ("train\\n", "eval\\n")
                print(4.0, flush=True)
            """)
    )
    stand_in.chmod(0o755)

    data.main([*SMALL, "--pairs", "1", "--tensorflow-python", str(stand_in)])

    text = capsys.readouterr().out
    assert "TensorFlow 2.99" in text
    rows = re.findall(r"^\| \w+ \| ([\d,]+) \| [\d,]+ \| \d+ \| ([\d.]+) \|", text, re.MULTILINE)
    assert len(rows) == 2
    for ours, ratio in rows:
        # Eight photos in four seconds are two a second.
        assert float(ratio) == pytest.approx(int(ours.replace(",", "")) / 2, rel=0.02)


@pytest.mark.tensorflow
def test_tf_data_reads_them(capsys):
    data.main(
        [*SMALL, "--pairs", "1", "--tensorflow-python", str(tiny_imagenet.tensorflow_python())]
    )

    text = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) \| [\d,]+ \| [\d,]+ \| [\d,]+ \| ([\d.]+) \|", text, re.MULTILINE)
    assert [name for name, _ in rows] == ["train", "eval"]
    assert all(float(ratio) > 0 for _, ratio in rows)
