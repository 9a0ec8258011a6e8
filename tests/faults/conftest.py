import pytest

from tests.train.small import NETWORK
from train.models import MODELS


@pytest.fixture(scope="module")
def small_network():
    """Runs in this process have a network that compiles in no time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, network in NETWORK.items():
            patch.setitem(MODELS, name, network)
        yield
