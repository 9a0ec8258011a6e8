"""Public recipes for ResNet-50 on ImageNet that CLARS is to be held against.

    python -m train imagenet-resnet50-goyal --data-dir DIR

Goyal et al., "Accurate, Large Minibatch SGD" (2017): SGD with Nesterov momentum at batch 8,192,
linear scaling of 0.1 for each 256 examples, five epochs of gradual warm-up, a tenth at epochs 30,
60 and 80; the last BatchNorm scale of each block starts at 0, BatchNorm statistics are those of 32
examples. Published: 76.3 % top-1 (table 1: 23.74 % error).

    python -m train imagenet-resnet50-nus --data-dir DIR

The LARS reimplementation of NUS-HPC-AI-Lab (LARS-ImageNet-PyTorch on GitHub) at batch 16,384: peak
2^4.5 after five epochs of warm-up, power 2, 90 epochs, weight decay 0.0001, label smoothing 0.1;
ratios and rates act outside of the momentum buffer. Published: 76.96 % top-1.

    python -m train imagenet-resnet50-mlperf --data-dir DIR

MLPerf Training 3.1 on eight GPUs with 400 examples each: LARS, peak 11 after two epochs of warm-up,
power 2, 37 epochs, weight decay 0.00005, label smoothing 0.1. Published: 75.9 % top-1, the target
that ends a run, at epoch 35. Its ratios and rates act inside of the buffer.

Rates are written as peak * 256 / batch, for they are scaled with the batch. Not copied are a
recipe's own crops and constants: LARS's denominator there is ||g|| + decay ||w||, here that of
`lars`; NUS also caps ratios at 50 and entries of the decayed gradient at 10, and its label
smoothing leaves out the label's own class. We have run none of these at full scale.
"""

import dataclasses

from train.config import Config

GOYAL = Config(
    config="imagenet-resnet50-goyal",
    dataset="imagenet2012",
    model="resnet50",
    dtype="bfloat16",
    zero_init_residual=True,
    optimizer="sgd",
    nesterov=True,
    learning_rates={"sgd": 0.1},
    warmup_epochs=5,
    schedule="step",
    decay_epochs=(30, 60, 80),
    batch_size=8192,
    microbatch_size=32,
    bn_group=1,
    epochs=90,
    weight_decay=1e-4,
)
NUS = Config(
    config="imagenet-resnet50-nus",
    dataset="imagenet2012",
    model="resnet50",
    dtype="bfloat16",
    optimizer="lars",
    learning_rates={"lars": 2**4.5 * 256 / 16384},
    warmup_epochs=5,
    schedule="polynomial",
    batch_size=16384,
    microbatch_size=128,
    bn_group=1,
    epochs=90,
    weight_decay=1e-4,
    label_smoothing=0.1,
)
MLPERF = dataclasses.replace(
    NUS,
    config="imagenet-resnet50-mlperf",
    optimizer="optax-lars",
    learning_rates={"optax-lars": 11 * 256 / 3200},
    warmup_epochs=2,
    batch_size=3200,
    microbatch_size=400,
    epochs=37,
    weight_decay=5e-5,
)
