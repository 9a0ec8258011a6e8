"""Prepares a data set for training: `python -m train.prepare NAME`.

Training reads ArrayRecord files and needs no TensorFlow. `tensorflow-datasets` needs it to write
them: the extra `imagenet` brings it, and is all that this module asks for.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import importlib.util
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
import tyro

IMAGENET = "imagenet2012"
# What `python -m train` and people call a data set, where tensorflow-datasets says otherwise.
NAMES = {"imagenet": IMAGENET, "fashion-mnist": "fashion_mnist"}
# The challenge's files and their bytes. The one with the photos of the test split is not needed.
TARS = {"ILSVRC2012_img_train.tar": 147_897_477_120, "ILSVRC2012_img_val.tar": 6_744_924_160}
FORMAT = tfds.core.FileFormat.ARRAY_RECORD

_INTERRUPTED = "python -m train.prepare: interrupted: what was unfinished is removed."
# As shells say of what SIGINT ends.
_EXIT_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a data set of tensorflow-datasets as ArrayRecord files, once, for `python -m train`.

    Attributes:
        name: imagenet, or any other name that tensorflow-datasets knows, with a configuration or a
            version where one is wanted: cifar10, imagenette/320px-v2, mnist:3.0.1.
        manual_dir: Folder with what has to be downloaded by hand. For imagenet:
            ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from https://image-net.org.
        data_dir: Folder of tensorflow-datasets, where the data set is put. None: what the variable
            TFDS_DATA_DIR names, or else ~/tensorflow_datasets.
    """

    name: tyro.conf.Positional[str]
    manual_dir: Path | None = None
    data_dir: Path | None = None


def prepare(arguments: Arguments) -> None:
    """Prepares a data set, if it is not there yet, and says where it is.

    Args:
        arguments: which one, from where and to where.

    Raises:
        ValueError: if an argument is wrong, or something is missing that is needed.
        OSError: if the data folder cannot be written to.
    """
    if arguments.name == "digits":
        print("The digits come with scikit-learn, and need no preparing. Next: python -m train")
        return
    data_dir = arguments.data_dir or Path(tfds.core.constants.DATA_DIR)
    name = NAMES.get(arguments.name, arguments.name)
    builder = _builder(name, data_dir)
    if _is_prepared(builder):
        print(f"{name} has been prepared before.")
    else:
        # What other sets take is known to tensorflow-datasets, which looks for itself.
        needed = _size_of_tars(arguments.manual_dir) if builder.name == IMAGENET else 0
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                "TensorFlow is not installed, but tensorflow-datasets needs it to write a data "
                "set: pip install -e '.[imagenet]', here or in a virtual environment of its own."
            )
        with _alone(builder):
            _check_space(Path(builder.data_path.parent), needed)
            _write(builder, arguments.manual_dir)
    splits = [f"{split.num_examples:,} {key}" for key, split in builder.info.splits.items()]
    print(f"It is in {builder.data_path}, with these examples: {', '.join(splits)}.")
    print(f"Next: {_next_command(builder.name, name)} --data-dir {shlex.quote(str(data_dir))}")


def _builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        # Its own message lists every data set that there is.
        known = [*NAMES, *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(name.partition("/")[0].partition(":")[0], known)
        raise ValueError(
            f"the data set is {name!r}, which tensorflow-datasets does not have. "
            + (f"Close to it: {', '.join(close)}. " if close else "")
            + "All are listed at https://www.tensorflow.org/datasets/catalog/overview."
        ) from None
    except Exception as error:  # Each kind of mistake in the name has a kind of its own.
        raise ValueError(
            f"the data set is {name!r}, but NAME, NAME/CONFIGURATION or either of them with "
            f":VERSION was expected, as tensorflow-datasets has them. It says: {_line(error)}"
        ) from error


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    folder = Path(builder.data_path)
    if not folder.exists():
        return False
    if not builder.is_prepared():
        raise ValueError(
            f"{folder} is there already, but without dataset_info.json, so it holds no data set "
            "that is finished: remove it, or name another folder with --data-dir."
        )
    if builder.info.file_format != FORMAT:
        raise ValueError(
            f"{folder} holds the data set as {builder.info.file_format.value}, where "
            f"{FORMAT.value} was expected: name another folder with --data-dir, or remove this one."
        )
    return True


def _size_of_tars(folder: Path | None) -> int:
    where = (
        f"the folder with {' and '.join(TARS)} was expected. They are at https://image-net.org, "
        "for those who have registered."
    )
    if folder is None:
        raise ValueError(f"--manual-dir is not given, but {where}")
    if not folder.is_dir():
        raise ValueError(f"--manual-dir is {folder}, which is no folder: {where}")
    missing = [name for name in TARS if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ValueError(
            f"--manual-dir is {folder}, which holds {found}, but not {' and '.join(missing)}: "
            f"{where}"
        )
    sizes = {name: (folder / name).stat().st_size for name in TARS}
    for name, size in sizes.items():
        # Cut at the right place, a tar file looks like a smaller one.
        if size != TARS[name]:
            print(
                f"Mind that {folder / name} has {size:,} bytes, and ImageNet's {TARS[name]:,}: was "
                "it downloaded to the end?"
            )
    return sum(sizes.values())


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free:,} bytes of free space, but the data set takes the {needed:,} of "
            "its tar files again: free some, or name another folder with --data-dir."
        )


@contextlib.contextmanager
def _alone(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
    """Keeps others from preparing the same meanwhile, and clears up after one that was killed.

    tensorflow-datasets writes into a folder with a random name, and nothing tells whether somebody
    still does. So this command holds a lock on a file as long as it runs. Killed, it leaves the
    file behind, with the names of the unfinished folders that were there before and are not its.
    """
    folder = Path(builder.data_path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f"preparing-{builder.version}"
    unfinished = {path.name for path in folder.glob(f"incomplete.*_{builder.version}")}
    foreign = set(lock.read_text().split()) if lock.exists() else unfinished
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is preparing {builder.info.full_name} in {folder} now: wait "
                "until it ends, or name another folder with --data-dir."
            ) from None
        file.truncate(0)
        file.write("\n".join(foreign))
        file.flush()
        _clear(folder, unfinished - foreign, unfinished & foreign)
        # Who stops it shall have read that.
        sys.stdout.flush()

        def stop(*_: object) -> None:
            for path in folder.glob(f"incomplete.*_{builder.version}"):
                if path.name not in foreign:
                    shutil.rmtree(path, ignore_errors=True)
            lock.unlink(missing_ok=True)
            os.write(sys.stderr.fileno(), f"{_INTERRUPTED}\n".encode())
            os._exit(_EXIT_INTERRUPTED)

        # An exception is lost where it meets a callback of the garbage collector, such as JAX has,
        # and what it is to stop may go on for hours.
        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            lock.unlink()


def _clear(folder: Path, own: set[str], foreign: set[str]) -> None:
    for name in sorted(own):
        print(f"Removing {folder / name}, which a preparation that was killed has left.")
        shutil.rmtree(folder / name)
    for name in sorted(foreign):
        print(
            f"Mind {folder / name}: if no other process is preparing the data set, it is a "
            f"leftover to remove: rm -r {shlex.quote(str(folder / name))}"
        )


def _write(builder: tfds.core.DatasetBuilder, manual_dir: Path | None) -> None:
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config, file_format=FORMAT)
    except Exception as error:  # A thousand builders fail in many ways.
        raise ValueError(
            f"tensorflow-datasets could not prepare {builder.info.full_name}. It says: "
            f"{_line(error)}"
        ) from error


def _next_command(builder_name: str, name: str) -> str:
    if builder_name == IMAGENET:
        return "python -m train imagenet-resnet50"
    if builder_name == NAMES["fashion-mnist"]:
        return "python -m train fashion-mnist"
    return f"python -m train --dataset {name}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> None:
    """Runs the command line."""
    arguments = tyro.cli(Arguments, prog="python -m train.prepare")
    try:
        prepare(arguments)
    except (ValueError, OSError) as error:
        print(f"python -m train.prepare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        sys.exit(_EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
