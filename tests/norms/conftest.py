import pytest

from clars_optax.norms import _one_batch, _taps
from tests.norms.interpreted import INTERPRETED, make_problem


@pytest.fixture(scope="module", autouse=True)
def _compiled_fast(compiled_fast):
    pass


@pytest.fixture
def problem():
    """Parameters and a batch for `network`."""
    return make_problem()


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the kernels run in the interpreter, wherever they can."""
    for module in (_one_batch, _taps):
        monkeypatch.setattr(module, "platform", lambda: INTERPRETED)
