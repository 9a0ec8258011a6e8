"""`python -m tests.train.small` is `python -m train` with a network that compiles in no time."""

import functools

from train.__main__ import main
from train.models import MODELS, resnet

# A convolution, BatchNorm and a dense layer, in the place of the network for the digits.
NETWORK = {"resnet8": functools.partial(resnet.ResNet, stage_sizes=(), width=4)}

if __name__ == "__main__":
    MODELS.update(NETWORK)
    main()
