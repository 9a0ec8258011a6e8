import gzip
import io

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from tests.train.idx import idx, write
from train.data import DATASETS, fashion_mnist

FASHION = DATASETS["fashion-mnist"]


class FashionMnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Stores what the builder of that name in `tensorflow-datasets` stores."""

    VERSION = tfds.core.Version("3.0.1")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        images, labels = made_up(split)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            PIL.Image.fromarray(image).save(file, "PNG")
            file.seek(0)
            yield index, {"image": file, "label": label}


def made_up(split):
    rng = np.random.default_rng(split == "train")
    number = 20 if split == "train" else 10
    return rng.integers(0, 256, (number, 28, 28), dtype=np.uint8), np.arange(number) % 10


def write_idx(folder, offset=0):
    splits = {split: made_up(split) for split in fashion_mnist.FILES}
    write(folder, {name: (x, (y + offset) % 10) for name, (x, y) in splits.items()})


@pytest.fixture(autouse=True)
def debian(tmp_path, monkeypatch):
    """A stand-in for the folder of Debian's package, which may be installed or not."""
    folder = tmp_path / "debian"
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A data folder with the authors' files."""
    write_idx(tmp_path / "data" / "fashion-mnist")
    return tmp_path / "data"


@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_the_files_of_the_authors(folder, split):
    examples = FASHION.load(folder, split)

    images, labels = made_up(split)
    assert len(examples) == len(images)
    np.testing.assert_array_equal([e["image"][..., 0] for e in examples], images)
    np.testing.assert_array_equal([e["label"] for e in examples], labels)
    assert examples[3]["image"].shape == FASHION.image_shape(FASHION.image_size)
    assert [examples[index]["label"] for index in (2, 3, 4)] == [2, 3, 4]
    assert examples[-1]["label"] == 9


def test_reads_the_files_of_debian(debian, tmp_path):
    write_idx(debian)

    assert FASHION.load(tmp_path / "data", "test")[3]["label"] == 3


def test_own_files_come_before_those_of_debian(debian, folder):
    write_idx(debian, offset=1)

    assert FASHION.load(folder, "test")[3]["label"] == 3


def test_prepared_data_set_comes_first(folder):
    tfds.disable_progress_bar()
    FashionMnist(data_dir=folder, file_format="array_record").download_and_prepare()
    for file in (folder / "fashion-mnist").iterdir():
        file.write_bytes(b"not to be read")

    examples = FASHION.load(folder, "train")

    images, labels = made_up("train")
    order = np.lexsort(np.transpose([e["image"].ravel() for e in examples]))
    expected = np.lexsort(np.transpose(images.reshape(len(images), -1)))
    np.testing.assert_array_equal([examples[i]["image"][..., 0] for i in order], images[expected])
    np.testing.assert_array_equal([examples[i]["label"] for i in order], labels[expected])


def test_missing_files_are_said_to_be_had_in_two_ways(debian, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        FASHION.load(tmp_path / "data", "train")

    message = str(error.value)
    assert str(debian) in message
    assert str(tmp_path / "data" / "fashion-mnist") in message
    assert "train-images-idx3-ubyte.gz" in message
    assert "apt-get install dataset-fashion-mnist" in message
    assert "github.com/zalandoresearch/fashion-mnist" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>404</html>", "no whole gzip file"),
        (idx(np.zeros((10, 28, 28)))[:-20], "no whole gzip file"),
        (gzip.compress(b"\0\0"), r"begins with \[\], and 2 bytes follow"),
        (idx(np.zeros(10)), r"begins with \[2049, 10, .* magic number 2051, 3 sizes"),
        (idx(np.zeros((10, 28))), r"begins with \[2050, 10, 28"),
        (gzip.compress(gzip.decompress(idx(np.zeros((10, 2, 2))))[:-1]), "and 39 bytes follow"),
        (idx(np.zeros((9, 28, 28))), "holds 9 images, but .* 10 labels"),
    ],
    # Not the contents, which hold the time of their compression.
    ids=["page", "cut", "empty", "labels", "flat", "byte missing", "too few"],
)
def test_damaged_file_is_named(folder, content, message):
    (folder / "fashion-mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(content)

    with pytest.raises(ValueError, match=f"t10k-images.*{message}.*download"):
        FASHION.load(folder, "test")


def test_training_images_are_moved_and_flipped():
    image = np.zeros((28, 28, 1), np.uint8)
    image[14, 10] = 255
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(2000):
        view = FASHION.augment({"image": image}, 28, rng)
        assert view.shape == image.shape
        places.update(zip(*np.nonzero(view[..., 0]), strict=True))

    # Left alone the bright pixel is in column 6 to 14, flipped in 13 to 21.
    assert places == {(row, column) for row in range(10, 19) for column in range(6, 22)}


def test_training_images_are_those_of_the_runs_so_far():
    def augment(image, rng):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        top, left = rng.integers(8, size=2, endpoint=True)
        moved = padded[top : top + 28, left : left + 28]
        return moved[:, ::-1] if rng.random() < 0.5 else moved

    here, there = (np.random.default_rng(5) for _ in range(2))
    for pixels in made_up("train")[0]:
        image = pixels[..., np.newaxis]
        np.testing.assert_array_equal(
            FASHION.augment({"image": image}, 28, here), augment(image, there)
        )


def test_test_images_stay_as_they_are():
    image = made_up("test")[0][0][..., np.newaxis]

    np.testing.assert_array_equal(FASHION.crop({"image": image}, 28), image)


def test_other_sizes_are_scaled():
    example = {"image": np.full((28, 28, 1), 50, np.uint8)}

    assert FASHION.augment(example, 32, np.random.default_rng(0)).shape == (32, 32, 1)
    np.testing.assert_array_equal(FASHION.crop(example, 14), np.full((14, 14, 1), 50))


def test_constants_are_the_published_ones():
    np.testing.assert_allclose(np.divide(FASHION.mean, 255), 0.2860, atol=5e-5)
    np.testing.assert_allclose(np.divide(FASHION.std, 255), 0.3530, atol=5e-5)
