"""ResNet-20 on Fashion-MNIST, with CLARS and no warm-up, at a fifteenth of the data set per step.

XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m train fashion-mnist
"""

from train.config import Config

CONFIG = Config(
    config="fashion-mnist",
    dataset="fashion-mnist",
    model="resnet20",
    optimizer="clars",
    learning_rates={"clars": 0.1},
    trust_coefficient=0.125,
    max_trust_ratio=1.25,
    batch_size=4096,
    microbatch_size=256,
    transfer_size=512,
    bn_group=1,
    epochs=12,
    weight_decay=1e-4,
)
