"""ResNet-20 on Fashion-MNIST, with CLARS and no warm-up, at a fifteenth of the data set per step.

python -m train fashion-mnist
"""

from train.config import Config

CONFIG = Config(
    config="fashion-mnist",
    dataset="fashion-mnist",
    model="resnet20",
    optimizer="clars",
    learning_rates={"clars": 2.0},
    batch_size=4096,
    transfer_size=512,
    epochs=10,
    weight_decay=1e-4,
    norm_momentum=0.5,
)
