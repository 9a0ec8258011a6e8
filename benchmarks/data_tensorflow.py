"""The other side of `benchmarks.data`: tf.data, with the pipeline that ImageNet trainings share.

It needs TensorFlow alone. `benchmarks.data` starts it as a process of its own.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import time_round

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf


def train_batches(file: str, batch_size: int, size: int) -> Iterator[np.ndarray]:
    """Endless shuffled batches of random views: 8 to 100 % of a photo, flipped or not.

    Args:
        file: TFRecord file with "image", a JPEG file.
        batch_size: photos per batch.
        size: height and width of the results, which are uint8.
    """

    def prepare(record: Any) -> Any:
        photo = _photo(record)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(photo),
            tf.zeros([1, 0, 4]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        view = _decode_view(photo, begin[:2], extent[:2], size)
        return tf.image.random_flip_left_right(view)

    records = tf.data.TFRecordDataset(file).shuffle(1024).repeat()
    return _batches(records, prepare, batch_size)


def eval_batches(file: str, batch_size: int, size: int) -> Iterator[np.ndarray]:
    """Endless batches of the centres, of 224/256 of the shorter side.

    Args:
        file: as in `train_batches`.
        batch_size: photos per batch.
        size: height and width of the results, which are uint8.
    """

    def prepare(record: Any) -> Any:
        photo = _photo(record)
        shape = tf.io.extract_jpeg_shape(photo)[:2]
        side = tf.cast(tf.cast(tf.reduce_min(shape), tf.float32) * 224 / 256, tf.int32)
        return _decode_view(photo, (shape - side) // 2, tf.stack([side, side]), size)

    return _batches(tf.data.TFRecordDataset(file).repeat(), prepare, batch_size)


def _photo(record: Any) -> Any:
    features = {"image": tf.io.FixedLenFeature([], tf.string)}
    return tf.io.parse_single_example(record, features)["image"]


def _decode_view(photo: Any, begin: Any, extent: Any, size: int) -> Any:
    view = tf.io.decode_and_crop_jpeg(photo, tf.concat([begin, extent], 0), channels=3)
    return tf.cast(tf.image.resize(view, [size, size]), tf.uint8)


def _batches(records: Any, prepare: Any, batch_size: int) -> Iterator[np.ndarray]:
    images = records.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return images.batch(batch_size, drop_remainder=True).prefetch(2).as_numpy_iterator()


def _write(photos: list[Path], file: Path) -> None:
    with tf.io.TFRecordWriter(str(file)) as writer:
        for photo in photos:
            value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[photo.read_bytes()]))
            features = tf.train.Features(feature={"image": value})
            writer.write(tf.train.Example(features=features).SerializeToString())


def main() -> None:
    """Answers each line of standard input, "train" or "eval", with the seconds of a round."""
    folder, batch_size, size, num_batches = Path(sys.argv[1]), *map(int, sys.argv[2:])
    batches = {}
    for name, make in {"train": train_batches, "eval": eval_batches}.items():
        file = folder / f"{name}.tfrecord"
        _write(sorted((folder / name).iterdir()), file)
        batches[name] = make(str(file), batch_size, size)
    print(tf.__version__, flush=True)
    for line in sys.stdin:
        print(time_round(batches[line.strip()], num_batches), flush=True)


if __name__ == "__main__":
    main()
