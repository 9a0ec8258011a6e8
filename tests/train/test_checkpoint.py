import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.checkpoint import Checkpoints
from train.state import TrainState


def new_state(value, **options):
    return TrainState.create(
        apply_fn=None,
        params={"kernel": jnp.full((2, 3), value), "scale": jnp.full(3, value, jnp.bfloat16)},
        tx=optax.adam(0.1),
        batch_stats={"mean": jnp.full(3, value)},
        **options,
    ).replace(step=jnp.int32(0))  # As `draw_state` makes it.


def evaluation_of(accuracy):
    return {"test_loss": 1 - accuracy, "test_accuracy": accuracy}


def save_all(folder, evaluations):
    """Saves steps from 1 on, each with its number in the weights."""
    with Checkpoints(folder) as checkpoints:
        for step, evaluation in enumerate(evaluations, start=1):
            checkpoints.save(new_state(float(step)).replace(step=step), evaluation)


def restore(folder):
    """Restores where no checkpoint is damaged."""
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(new_state(0.0), pytest.fail)


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_round_trip(tmp_path):
    state = new_state(1.0)
    params = state.params
    averaged = {"params": params, "batch_stats": state.batch_stats}
    state = state.replace(ema=averaged, ema_decay=0.5)
    for _ in range(3):
        grads = jax.tree.map(lambda x: jnp.full_like(x, 1 / 3), params)
        state = state.apply_gradients(grads=grads, batch_stats={"mean": jnp.full(3, 0.25)})
    like = jax.tree.map(jnp.zeros_like, state)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, evaluation_of(0.5))
    with Checkpoints(tmp_path) as checkpoints:
        restored, evaluation = checkpoints.restore(like, pytest.fail)
        arrays = checkpoints.arrays(3)

    assert evaluation == evaluation_of(0.5)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, expected, strict=True)
    np.testing.assert_array_equal(arrays["params"]["kernel"], state.params["kernel"])
    np.testing.assert_array_equal(arrays["opt_state"][0]["count"], 3)


def test_no_checkpoint(tmp_path):
    assert restore(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


def test_what_training_goes_on_with_is_not_saved(tmp_path):
    state = jax.jit(lambda: new_state(1.0))()
    take_step = jax.jit(
        lambda state: jax.tree.map(lambda x: x + x.dtype.type(1), state), donate_argnums=0
    )

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        for _ in range(3):
            state = take_step(state)
        jax.block_until_ready(state)

    restored, _ = restore(tmp_path)
    np.testing.assert_array_equal(restored.params["kernel"], 1.0)


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [
        ([0.2], [1]),
        ([0.2, 0.8, 0.4, 0.6, 0.5], [2, 4, 5]),
        ([0.2, 0.4, 0.6, 0.8], [3, 4]),
        ([0.8, 0.6, 0.4, 0.2], [1, 3, 4]),
        ([0.8, 0.8, 0.4, 0.2], [2, 3, 4]),
        # Without an evaluation one is never the best.
        ([None, 0.2, None, None, None], [2, 4, 5]),
        ([None, None, None], [2, 3]),
        ([0.0, None, None, None], [1, 3, 4]),
    ],
)
def test_last_two_and_best_are_kept(accuracies, kept, tmp_path):
    evaluations = [{} if value is None else evaluation_of(value) for value in accuracies]

    save_all(tmp_path, evaluations)
    restored, evaluation = restore(tmp_path)

    assert steps_in(tmp_path) == kept
    np.testing.assert_array_equal(restored.params["kernel"], float(len(accuracies)))
    assert evaluation == evaluations[-1]


def test_best_of_an_earlier_part_of_the_run_is_kept(tmp_path):
    save_all(tmp_path, map(evaluation_of, (0.2, 0.8, 0.4, 0.6)))

    with Checkpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(new_state(0.0), pytest.fail)
        for step in (5, 6, 7):
            checkpoints.save(state.replace(step=step), evaluation_of(0.7))
            checkpoints.wait()
            assert checkpoints.steps() == steps_in(tmp_path) == [2, step - 1, step]


def test_step_is_saved_again_with_its_evaluation(tmp_path):
    save_all(tmp_path, [evaluation_of(0.2), {}])

    with Checkpoints(tmp_path) as checkpoints:
        state, evaluation = checkpoints.restore(new_state(0.0), pytest.fail)
        assert evaluation == {}
        checkpoints.save(state, evaluation_of(0.4))

    assert steps_in(tmp_path) == [1, 2]
    assert restore(tmp_path)[1] == evaluation_of(0.4)


def test_save_without_restore_leaves_earlier_ones_alone(tmp_path):
    save_all(tmp_path, [{}, {}])

    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 4, 5):
            checkpoints.save(new_state(0.0).replace(step=step), {})

    assert steps_in(tmp_path) == [1, 2, 4, 5]


def test_files_on_the_disk(tmp_path):
    save_all(tmp_path, [evaluation_of(0.25)])

    folder = tmp_path / "1"
    *lines, last = (folder / "checksums.txt").read_text().split("\n")
    sums = {name: (sha256, int(size)) for sha256, size, name in map(str.split, lines)}
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "checksums.txt"
    }
    assert sums == {
        name: (hashlib.sha256(contents).hexdigest(), len(contents))
        for name, contents in files.items()
    }
    assert last == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert json.loads(files["evaluation.json"]) == evaluation_of(0.25)
