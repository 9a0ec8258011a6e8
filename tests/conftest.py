"""Eight CPU devices for every test, so that `pmap` and `shard_map` have something to map over."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
