import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import checkpoint
from train.state import TrainState


def new_state(value):
    return TrainState.create(
        apply_fn=None,
        params={"kernel": jnp.full((2, 3), value)},
        tx=optax.sgd(0.1, momentum=0.9),
        batch_stats={"mean": jnp.full(3, value)},
    )


def test_round_trip(tmp_path):
    state = new_state(1.0)
    for _ in range(3):
        grads = {"kernel": jnp.full((2, 3), 0.5)}
        state = state.apply_gradients(grads=grads, batch_stats={"mean": jnp.full(3, 0.25)})

    with checkpoint.open_folder(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state)
    with checkpoint.open_folder(tmp_path) as checkpoints:
        restored = checkpoint.restore(checkpoints, new_state(0.0))

    assert int(restored.step) == 3
    for name in ("params", "opt_state", "batch_stats"):
        actual, expected = getattr(restored, name), getattr(state, name)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_latest_of_two_is_restored(tmp_path):
    with checkpoint.open_folder(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, new_state(float(step)).replace(step=step))
        restored = checkpoint.restore(checkpoints, new_state(0.0))

    np.testing.assert_array_equal(restored.params["kernel"], 2.0)
