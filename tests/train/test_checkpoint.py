import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import checkpoint
from train.state import TrainState


def new_state(value, **options):
    return TrainState.create(
        apply_fn=None,
        params={"kernel": jnp.full((2, 3), value)},
        tx=optax.sgd(0.1, momentum=0.9),
        batch_stats={"mean": jnp.full(3, value)},
        **options,
    )


def metrics_of(accuracy):
    return {"test_loss": 1 - accuracy, "test_accuracy": accuracy}


def test_round_trip(tmp_path):
    params = {"kernel": jnp.ones((2, 3))}
    state = new_state(1.0, ema_params=params, ema_decay=0.5)
    for _ in range(3):
        grads = {"kernel": jnp.full((2, 3), 0.5)}
        state = state.apply_gradients(grads=grads, batch_stats={"mean": jnp.full(3, 0.25)})

    with checkpoint.open_folder(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, metrics_of(0.5))
    with checkpoint.open_folder(tmp_path) as checkpoints:
        like = new_state(0.0, ema_params=params, ema_decay=0.5)
        restored, metrics = checkpoint.restore(checkpoints, like)

    assert int(restored.step) == 3
    assert metrics == metrics_of(0.5)
    for name in ("params", "opt_state", "batch_stats", "ema_params"):
        actual, expected = getattr(restored, name), getattr(state, name)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_last_and_best_are_kept(tmp_path):
    with checkpoint.open_folder(tmp_path) as checkpoints:
        for step, accuracy in enumerate((0.2, 0.8, 0.4, 0.6), start=1):
            state = new_state(float(step)).replace(step=step)
            checkpoint.save(checkpoints, state, metrics_of(accuracy))
        checkpoints.wait_until_finished()
        restored, metrics = checkpoint.restore(checkpoints, new_state(0.0))

    with checkpoint.open_folder(tmp_path) as checkpoints:
        assert list(checkpoints.all_steps()) == [2, 4]
        assert checkpoints.best_step() == 2
    np.testing.assert_array_equal(restored.params["kernel"], 4.0)
    assert metrics == metrics_of(0.6)
