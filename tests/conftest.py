"""Eight CPU devices for every test, so that `pmap` and `shard_map` have something to map over."""

import os

import hypothesis

# Continuous integration draws the same examples in every run.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
