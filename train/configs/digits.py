"""ResNet-8 on scikit-learn's handwritten digits: the first run, about a minute on two cores.

    python -m train

Half of the 1,437 training images per step, no warm-up, norms of every example's gradient. Held-out
accuracy to expect after the 60 steps, with seeds 0 and 1 on one CPU device:

    python -m train                     98.6 %, 98.1 %
    python -m train --optimizer lars    ?
    python -m train --optimizer sgd     98.3 %, 98.6 %

One image in 360 is 0.3 %: the digits are too easy to tell the optimizers apart.
"""

from train.config import Config

CONFIG = Config(
    config="digits",
    dataset="digits",
    model="resnet8",
    optimizer="clars",
    tuned_learning_rates={"clars": 3.0, "lars": 1.0, "sgd": 0.3},
    batch_size=720,
    epochs=30,
    weight_decay=1e-4,
    norm_momentum=0.5,
)
