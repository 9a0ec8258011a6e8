"""Eight CPU devices for every test, so that `pmap` and `shard_map` have something to map over."""

import os

import hypothesis
import pytest

# Continuous integration draws the same examples in every run.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="kill twenty times instead of twice, and draw ten times as many examples",
    )


def pytest_configure(config):
    if config.getoption("--full"):
        settings = hypothesis.settings()
        hypothesis.settings.register_profile(
            "full", settings, max_examples=10 * settings.max_examples
        )
        hypothesis.settings.load_profile("full")


@pytest.fixture(scope="session")
def full(request):
    """Whether the tests may take as long as they need."""
    return request.config.getoption("--full")


os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data folder for all tests, lest they write to the user's."""
    return tmp_path_factory.mktemp("data")
