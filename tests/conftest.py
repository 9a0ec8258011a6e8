"""For every test: eight CPU devices, for `pmap` and `shard_map`, and what others have compiled."""

import importlib.util
import os
import shutil
import tempfile

import hypothesis
import jaxlib
import pytest

# Continuous integration draws the same examples in every run.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


# Most of the time goes into compiling. What one test compiles serves the others, in other processes
# too: the two that pytest starts, and runs of commands. JAX wants to know that when it is imported.
_COMPILED = "JAX_COMPILATION_CACHE_DIR"
_made_here = _COMPILED not in os.environ
if _made_here:
    os.environ[_COMPILED] = tempfile.mkdtemp(prefix="clars_optax_compiled_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_unconfigure():
    if _made_here:
        shutil.rmtree(os.environ.pop(_COMPILED), ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="kill twenty times instead of twice, and draw ten times as many examples",
    )


def pytest_configure(config):
    if config.getoption("-m") in ("cuda", "tpu"):
        # They are compiled for without being there, which fails once JAX has looked for them, and
        # where it reads what it has compiled.
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
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
if (
    tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11)
    # Which ends a process that has flags that it does not know.
    and importlib.util.find_spec("libtpu") is None
):
    # The older of XLA's two ways to write loops compiles twice as fast; later it has one. And each
    # worker has a core: threads that share out what one of them compiles only get in the way.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"


@pytest.fixture(scope="module")
def compiled_fast():
    """For tests that compile much and run little: LLVM, unlike XLA, does not do its best."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data folder for all tests, lest they write to the user's."""
    return tmp_path_factory.mktemp("data")
