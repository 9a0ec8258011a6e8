import pytest


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data folder for all tests, lest they write to the user's."""
    return tmp_path_factory.mktemp("data")
