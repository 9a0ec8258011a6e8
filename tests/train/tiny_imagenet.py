"""A tiny ImageNet on disk, which the real builder of `tensorflow-datasets` reads."""

import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

# Eight labels from all over the thousand; each has its own corner of the colour cube.
LABELS = (0, 7, 130, 281, 467, 604, 880, 999)


def write(data_dir, num_train=64, num_validation=24):
    """Writes splits "train" and "validation" as ArrayRecord files below data_dir/imagenet2012.

    The photos are 80 to 120 pixels high and wide, patterns in the colour of their label, which
    takes the values of LABELS in turn.
    """
    tfds.disable_progress_bar()
    builder = Imagenet2012(num_train, num_validation, data_dir=data_dir)
    builder.download_and_prepare()


# Registered, it would take the place of the real one.
class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("5.1.0")

    def __init__(self, num_train, num_validation, *, data_dir):
        self._num_photos = {"train": num_train, "validation": num_validation}
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(
                        names_file=tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
                    ),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://image-net.org/",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in self._num_photos}

    def _generate_examples(self, split):
        rng = np.random.default_rng(split == "train")
        names = self.info.features["label"].names
        for index in range(self._num_photos[split]):
            label = LABELS[index % len(LABELS)]
            if split == "train":
                name = f"{names[label]}_{index}.JPEG"
            else:
                name = f"ILSVRC2012_val_{index + 1:08d}.JPEG"
            yield name, {"image": _jpeg(label, rng), "label": label, "file_name": name}


def _jpeg(label, rng):
    height, width = rng.integers(80, 120, size=2, endpoint=True).tolist()
    corner = [(LABELS.index(label) >> bit) & 1 for bit in range(3)]
    # Coarse noise made large looks and compresses more like a photo than noise of single pixels.
    pattern = rng.integers(15, 65, size=(8, 8, 3), dtype=np.uint8)
    pixels = np.asarray(
        PIL.Image.fromarray(pattern).resize((width, height), PIL.Image.Resampling.BICUBIC)
    )
    photo = pixels + np.uint8(170) * np.array(corner, np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(photo).save(file, "JPEG", quality=90)
    file.seek(0)
    return file
