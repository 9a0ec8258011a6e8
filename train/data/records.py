"""A split that `tensorflow-datasets` has prepared, and what may be wrong with its files."""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from train.data.dataset import Example
from train.text import first_line

# What comes of damaged bytes: from the ArrayRecord file (RuntimeError), from the record in it
# (DecodeError), and from the features in that, of which some may be missing or of another kind.
_DAMAGED = (RuntimeError, DecodeError, AttributeError, KeyError, TypeError, ValueError)


class Records(Sequence[Example]):
    """A split, its images still encoded.

    Every example has an "image", the content of a file where it is one, a "label", and a "name" for
    messages. One that cannot be read is a ValueError with that name.
    """

    def __init__(
        self,
        source: Sequence[Example],
        shards: Sequence[tfds.core.utils.shard_utils.FileInstruction],
        name: str,
        features: dict[str, str],
    ) -> None:
        self._source = source
        self._shards = shards
        self._ends = list(itertools.accumulate(shard.take for shard in shards))
        self._name = name
        self._features = features

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        # The source would say of an index out of range that it is a ValueError.
        index = range(len(self))[index]
        try:
            example = self._source[index]
            read = {name: example[feature] for name, feature in self._features.items()}
            missing = [name for name, value in read.items() if value is None]
            if missing:
                raise ValueError(f"it has no {' and no '.join(missing)}")
            title = f"{read['file_name'].decode()}, " if "file_name" in read else ""
        except _DAMAGED as error:
            raise ValueError(
                f"{self.place(index)} cannot be read: {first_line(error)}. The file is damaged: "
                "restore it, or prepare the data set again."
            ) from error
        return {**read, "name": f"{title}{self.place(index)}"}

    def place(self, index: int) -> str:
        """Says which example it is, and where it lies."""
        number = bisect.bisect_right(self._ends, index)
        shard = self._shards[number]
        record = index - self._ends[number] + shard.take + shard.skip
        return f"example {index} of {self._name} (record {record} of {shard.filename})"


def open_split(
    builder: tfds.core.DatasetBuilder, split: str, command: str, **features: str
) -> Records:
    """Opens a split; no example is read yet.

    Args:
        builder: of a data set that is prepared in ArrayRecord files.
        split: its name, or what part of it: "train[:90%]".
        command: what writes the data set again.
        **features: names of the features that are the "image", the "label" and, where there is
            one, the "file_name", by which the example is called in messages.

    Raises:
        FileNotFoundError: if a file is missing or empty.
        ValueError: if a file holds another number of records than it was written with, or there
            are no examples.
    """
    name = f"the split {split} of {builder.info.full_name}"
    shards = builder.info.splits[split].file_instructions
    if not shards:
        raise ValueError(
            f"{name} in {builder.data_path} holds no examples, but at least one was expected: "
            f"remove the folder and write the data set again with {command}."
        )
    for shard in shards:
        _check(Path(shard.filename), shard.examples_in_shard, command)
    # Other images of an example, such as masks, are never looked at.
    decoders = {
        feature: tfds.decode.SkipDecoding()
        for feature, kind in builder.info.features.items()
        if isinstance(kind, tfds.features.Image)
    }
    return Records(builder.as_data_source(split, decoders=decoders), shards, name, features)


def _check(shard: Path, expected: int, command: str) -> None:
    again = f"restore it, or remove {shard.parent} and write the data set again with {command}."
    size = shard.stat().st_size if shard.is_file() else None
    if not size:
        raise FileNotFoundError(
            f"{shard} {'is missing' if size is None else 'is empty'}, where an ArrayRecord file "
            f"with {expected} examples was expected: {again}"
        )
    reader = ArrayRecordReader(str(shard))
    # Of a file that it cannot read it says that there are none in it.
    found, reason = reader.num_records(), ""
    try:
        reader.close()
    except RuntimeError as error:  # Only here it says why, if at all.
        reason = first_line(error)
    if found != expected:
        raise ValueError(
            f"{shard} has {size} bytes, in which {found} examples are found, where {expected} were "
            f"expected, as dataset_info.json says. {reason or 'The file is damaged'}: {again}"
        )
