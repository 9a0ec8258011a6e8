"""Data sets that `tensorflow-datasets` has prepared before, read without TensorFlow."""

from pathlib import Path

import tensorflow_datasets as tfds


def folder(data_dir: Path | None) -> Path:
    """Returns the data folder: the given one, or the default of `tensorflow-datasets`."""
    return Path(tfds.core.constants.DATA_DIR) if data_dir is None else data_dir


def find(name: str, version: str, data_dir: Path | None) -> tfds.core.DatasetBuilder | None:
    """Looks for a data set in ArrayRecord files, the format that needs no TensorFlow.

    Args:
        name: what `tensorflow-datasets` calls it.
        version: its version, with stars for the parts that do not matter.
        data_dir: the data folder; None for the default of `tensorflow-datasets`.

    Returns:
        Its builder, or None where it is not there, or only in another format.
    """
    # Without a look first, the builder warns of every data set that is not there.
    if not any((folder(data_dir) / name).glob(f"{version}/dataset_info.json")):
        return None
    try:
        return tfds.builder(f"{name}:{version}", data_dir=data_dir, file_format="array_record")
    except ValueError:  # It was prepared in another format.
        return None
