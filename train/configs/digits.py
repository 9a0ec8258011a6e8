"""A small BatchNorm ResNet on scikit-learn's handwritten digits: a first run in about a minute."""

from train.config import Config

CONFIG = Config(
    config="digits",
    dataset="digits",
    model="resnet8",
    optimizer="clars",
    tuned_learning_rates={"clars": 1.0, "lars": 10.0, "sgd": 0.1},
    batch_size=720,
    epochs=30,
    weight_decay=1e-4,
)
