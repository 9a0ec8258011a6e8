"""Data sets that `tensorflow-datasets` has prepared before, read without TensorFlow."""

import json
import re
from pathlib import Path

import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]

from train.text import first_line

# What `tensorflow-datasets` raises where a description that lies with the files is damaged.
DAMAGED = (ParseError, json.JSONDecodeError)

# As tensorflow-datasets takes them, but for arguments of a builder and for the sets of others.
_NAME = re.compile(
    r"(?P<name>[a-zA-Z]\w*)(/(?P<config>\w[\w+.-]*))?(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?",
    re.ASCII,
)


def folder(data_dir: Path | None) -> Path:
    """Returns the data folder: the given one, or the default of `tensorflow-datasets`.

    Raises:
        NotADirectoryError: if it is a file.
    """
    chosen = Path(tfds.core.constants.DATA_DIR) if data_dir is None else data_dir
    if chosen.is_file():
        raise NotADirectoryError(
            f"the data folder is {chosen}, which is a file, but must be a folder: name another one "
            "with --data-dir."
        )
    return chosen


def find(name: str, version: str, data_dir: Path | None) -> tfds.core.DatasetBuilder | None:
    """Looks for a data set in ArrayRecord files, the format that needs no TensorFlow.

    Args:
        name: what `tensorflow-datasets` calls it.
        version: its version, with stars for the parts that do not matter.
        data_dir: the data folder; None for the default of `tensorflow-datasets`.

    Returns:
        Its builder, or None where it is not there, or only in another format.

    Raises:
        ValueError: if its description is damaged.
    """
    # Without a look first, the builder warns of every data set that is not there.
    if not any((folder(data_dir) / name).glob(f"{version}/dataset_info.json")):
        return None
    try:
        return tfds.builder(f"{name}:{version}", data_dir=data_dir, file_format="array_record")
    except DAMAGED as error:
        raise damaged_description(folder(data_dir) / name, error) from error
    except ValueError:  # It was prepared in another format.
        return None


def is_name(name: str) -> bool:
    """Whether it is of the form NAME, NAME/CONFIGURATION, NAME:VERSION or all three."""
    return _NAME.fullmatch(name) is not None


def folders(name: str, data_dir: Path | None) -> list[Path]:
    """Lists where a data set is prepared, in whatever format, the newest version last.

    Args:
        name: as `is_name` says. Without a configuration it is the default one of a data set that
            has several; without a version it is every version.
        data_dir: the data folder; None for the default of `tensorflow-datasets`.
    """
    parts = _NAME.fullmatch(name)
    assert parts is not None
    above = folder(data_dir) / tfds.core.naming.camelcase_to_snakecase(parts["name"])
    config = parts["config"] or tfds.core.dataset_builder.load_default_config_name(above) or ""
    return [
        above / config / str(version)
        for version in tfds.core.utils.version.list_all_versions(above / config)
        if version.match(parts["version"] or "*.*.*")
        and (above / config / str(version) / "dataset_info.json").is_file()
    ]


def open_folder(prepared: Path) -> tfds.core.DatasetBuilder:
    """Opens a data set for reading by what lies in its folder; nobody's code is run.

    Args:
        prepared: one of `folders`.

    Raises:
        FileNotFoundError: if there are no ArrayRecord files.
        ValueError: if its description is damaged.
    """
    try:
        return tfds.builder_from_directory(prepared, file_format="array_record")
    except DAMAGED as error:
        raise damaged_description(prepared, error) from error
    except ValueError as error:
        raise FileNotFoundError(
            f"{prepared} cannot be read: {first_line(error)} Expected are ArrayRecord "
            "files: write them with `python -m train.prepare`."
        ) from error


def damaged_description(prepared: Path, error: Exception) -> ValueError:
    """Makes the error to raise instead of one of `DAMAGED`.

    Args:
        prepared: the folder of the data set, or one above it.
        error: what `tensorflow-datasets` raised.
    """
    return ValueError(
        f"dataset_info.json or features.json in {prepared} is damaged ({error}), where what "
        "tensorflow-datasets wrote was expected: restore it, or remove the folder and prepare the "
        "data set again."
    )
