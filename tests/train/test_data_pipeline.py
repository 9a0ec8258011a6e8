import dataclasses
import threading

import cv2
import numpy as np
import pytest

from tests.train.batches import assert_same, join
from train.data import DATASETS
from train.data.pipeline import eval_batches, train_batches

# As many classes as any test has examples, so that the label tells which one it is.
DIGITS = dataclasses.replace(DATASETS["digits"], num_classes=1000)


def add_noise(example, size, rng):
    return example["image"] + rng.integers(0, 100, size=(size, size, 1), dtype=np.uint8)


NOISY = dataclasses.replace(DIGITS, augment=add_noise)


def make_examples(number, size=2):
    return [
        {"image": np.full((size, size, 1), (i + 1) % 256, np.uint8), "label": i, "name": f"no. {i}"}
        for i in range(number)
    ]


def noisy_batches(number, **options):
    return train_batches(NOISY, make_examples(number), **{"image_size": 2, "seed": 0, **options})


def take(batches, number):
    """The next batches, joined to one."""
    return join([next(batches) for _ in range(number)])


def test_training_batches_have_the_types_that_the_step_expects():
    batch = next(noisy_batches(5, batch_size=3))

    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "image": ((3, 2, 2, 1), np.uint8),
        "label": ((3,), np.int32),
        "bad_examples": ((), np.int32),
    }


def test_batches_run_across_the_end_of_a_pass():
    batches = train_batches(DIGITS, make_examples(5), batch_size=3, image_size=2, seed=0)

    labels = take(batches, 5)["label"]

    assert [sorted(labels[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert not np.array_equal(labels[:5], labels[5:10])


def test_batches_may_be_larger_than_a_pass():
    labels = next(noisy_batches(5, batch_size=15))["label"]

    assert sorted(labels) == sorted([0, 1, 2, 3, 4] * 3)


def test_seed_determines_order_and_images():
    first, again, other = (next(noisy_batches(200, batch_size=64, seed=seed)) for seed in (3, 3, 4))

    assert_same(first, again)
    assert not np.array_equal(first["label"], other["label"])
    assert not np.array_equal(first["image"], other["image"])


def test_an_example_looks_different_in_each_pass():
    batches = noisy_batches(5, batch_size=5)
    views = [
        batch["image"][np.argsort(batch["label"])] for batch in (next(batches) for _ in range(3))
    ]

    assert len(np.unique(np.stack(views)[:, 0], axis=0)) == 3


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_together_get_what_one_would_get(process_count):
    single = noisy_batches(13, batch_size=12)
    parts = [
        noisy_batches(13, batch_size=12, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]

    for _ in range(5):
        assert_same(join([next(part) for part in parts]), next(single))


def test_batch_size_changes_where_the_stream_is_cut_and_nothing_else():
    assert_same(
        take(noisy_batches(100, batch_size=40), 3), take(noisy_batches(100, batch_size=60), 2)
    )


def test_iterator_goes_on_from_its_state():
    options = {"batch_size": 6, "process_index": 1, "process_count": 2}
    batches = noisy_batches(13, **options)
    take(batches, 4)
    state = batches.get_state()
    expected = take(batches, 3)

    other = noisy_batches(13, **options)
    next(other)
    other.set_state(state)
    batches.set_state(state)

    assert_same(take(other, 3), expected)
    assert_same(take(batches, 3), expected)


def test_state_is_the_same_on_every_process():
    states = []
    for index in range(2):
        batches = noisy_batches(13, batch_size=6, process_index=index, process_count=2)
        take(batches, 3)
        states.append(batches.get_state())

    assert states[0] == states[1]


@pytest.mark.parametrize("damaged", [0, 999])
def test_failure_of_an_example_reaches_the_loop(damaged):
    def crop(example, size):
        if example["label"] == damaged:
            raise ValueError(f"photo {damaged} cannot be decoded")
        return example["image"]

    dataset = dataclasses.replace(DIGITS, crop=crop)

    with pytest.raises(ValueError, match=f"photo {damaged} cannot be decoded"):
        next(eval_batches(dataset, make_examples(1000), batch_size=1000, image_size=2))


def shrink_to_nothing(image):
    return cv2.resize(image, (0, 0))


def want_too_much(image):
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "reason"), [(shrink_to_nothing, "resize"), (want_too_much, "memory is not enough")]
)
def test_photo_that_cannot_be_resized_is_a_bad_example(fail, reason):
    def crop(example, size):
        return fail(example["image"]) if example["label"] == 3 else example["image"]

    dataset = dataclasses.replace(DIGITS, crop=crop, augment=lambda ex, size, _: crop(ex, size))
    options = {"batch_size": 5, "image_size": 2}
    examples = make_examples(5)

    for batches in (
        train_batches(dataset, examples, **options, seed=0),
        eval_batches(dataset, examples, **options),
    ):
        with pytest.raises(ValueError, match=rf"^no\. 3 cannot be decoded or resized: .*{reason}"):
            next(iter(batches))
    trained = next(train_batches(dataset, examples, **options, seed=0, max_bad_examples=1))
    assert trained["bad_examples"] == 1
    assert 3 not in trained["label"]
    (evaluated,) = eval_batches(dataset, examples, **options, max_bad_examples=1)
    assert evaluated["mask"].tolist() == [1, 1, 1, 0, 1]


def test_evaluation_fills_up_the_last_batch():
    batches = list(eval_batches(DIGITS, make_examples(5), batch_size=3, image_size=2))

    assert [batch["image"].shape for batch in batches] == [(3, 2, 2, 1)] * 2
    np.testing.assert_array_equal(batches[1]["image"][2], 0)
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), [0, 1, 2, 3, 4, 0])
    np.testing.assert_array_equal(np.concatenate([b["mask"] for b in batches]), [1, 1, 1, 1, 1, 0])
    assert batches[0]["mask"].dtype == np.float32
    assert batches[0]["label"].dtype == np.int32


@pytest.mark.parametrize(("number", "process_count"), [(16, 2), (17, 4), (21, 2), (23, 8), (24, 1)])
def test_processes_together_evaluate_every_example_once(number, process_count):
    examples = make_examples(number)
    single = list(eval_batches(DIGITS, examples, batch_size=8, image_size=2))

    parts = [
        list(
            eval_batches(
                DIGITS,
                examples,
                batch_size=8,
                image_size=2,
                process_index=index,
                process_count=process_count,
            )
        )
        for index in range(process_count)
    ]

    assert {len(part) for part in parts} == {len(single)}
    for together, expected in zip(zip(*parts, strict=True), single, strict=True):
        assert_same(join(together), expected)
    whole = join(single)
    assert whole["label"][whole["mask"] == 1].tolist() == list(range(number))


def test_a_process_may_have_nothing_to_evaluate():
    (batch,) = eval_batches(
        DIGITS, make_examples(5), batch_size=8, image_size=2, process_index=3, process_count=4
    )

    assert_same(
        batch,
        {
            "image": np.zeros((2, 2, 2, 1), np.uint8),
            "label": np.zeros(2, np.int32),
            "mask": np.zeros(2, np.float32),
            "bad_examples": 0,
        },
    )


def test_unequal_parts_are_refused():
    with pytest.raises(ValueError, match=r"batch size is 8, but must be a multiple of .* 3"):
        noisy_batches(13, batch_size=8, process_count=3)


def test_evaluation_leaves_no_threads_behind():
    examples = make_examples(100)
    before = set(threading.enumerate())

    for _ in range(3):
        list(eval_batches(DIGITS, examples, batch_size=50, image_size=2))

    added = set(threading.enumerate()) - before
    for thread in added:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in added)
