import pytest


@pytest.fixture(scope="module", autouse=True)
def _compiled_fast(compiled_fast):
    pass
