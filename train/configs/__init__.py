"""The named configurations."""

from train.config import Config
from train.configs import digits, fashion_mnist, imagenet, imagenet_baselines

CONFIGS: dict[str, Config] = {
    config.config: config
    for config in (
        digits.CONFIG,
        fashion_mnist.CONFIG,
        imagenet.RESNET50,
        imagenet.DENSENET121,
        imagenet.MOBILENETV2,
        imagenet_baselines.GOYAL,
        imagenet_baselines.NUS,
        imagenet_baselines.MLPERF,
    )
}
