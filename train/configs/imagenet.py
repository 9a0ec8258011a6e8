"""The setting of the CLARS paper on ImageNet: 90 epochs without warm-up, for each family.

    python -m train imagenet-resnet50 --data-dir DIR --batch-size 16384
    python -m train imagenet-densenet121 --data-dir DIR --batch-size 16384
    python -m train imagenet-mobilenetv2 --data-dir DIR --batch-size 16384

The same commands run on one GPU, on eight, and on every host of a TPU pod slice (`--coordinator
auto`): a device takes 128 examples at a time, with BatchNorm statistics of their own, so that up to
128 devices make no difference but in time (and in what dropout drops). train/README.md has the
details.

Batch 16,384 is the largest of the paper as far as we know. From the authors' published code come
learning rate 0.128 for each 256 examples, falling with power 2 to 0.0001, weight decay 0.0002 on
all parameters, momentum 0.9 outside the trust ratio, trust coefficient 0.01 and its cap 0.1. They
take the norms of 64 groups of 8 examples, which is `--group-size 8 --num-norm-examples 512` on up
to 64 devices; what
stands here is the paper's formula, all examples by themselves. Crops, flips, BatchNorm's momentum
and MobileNetV2's dropout are the usual ones.

The paper's tables were not at hand, so that there is no public number to be met here. We have run
none of these at full scale.
"""

import dataclasses

from train.config import Config

RESNET50 = Config(
    config="imagenet-resnet50",
    dataset="imagenet2012",
    model="resnet50",
    dtype="bfloat16",
    optimizer="clars",
    learning_rates={"clars": 0.128},
    schedule="polynomial",
    end_learning_rate=1e-4,
    batch_size=16384,
    microbatch_size=128,
    bn_group=1,
    epochs=90,
    weight_decay=2e-4,
    weight_decay_mask="all",
)
DENSENET121 = dataclasses.replace(RESNET50, config="imagenet-densenet121", model="densenet121")
MOBILENETV2 = dataclasses.replace(
    RESNET50, config="imagenet-mobilenetv2", model="mobilenet_v2", dropout_rate=0.2
)
