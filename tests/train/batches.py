"""Batches, and parts of them, beside one another."""

import numpy as np


def join(batches):
    """The batches, or parts of one, as one; the count of bad examples is summed."""
    return {
        name: sum(batch[name] for batch in batches)
        if name == "bad_examples"
        else np.concatenate([batch[name] for batch in batches])
        for name in batches[0]
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])
