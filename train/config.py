"""Every option of a training run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, Suppress

from train.data.augmentation import AugmentationName
from train.optimizers import OptimizerName
from train.schedules import ScheduleName

ConfigName = Literal[
    "digits",
    "fashion-mnist",
    "imagenet-resnet50",
    "imagenet-densenet121",
    "imagenet-mobilenetv2",
    "imagenet-resnet50-goyal",
    "imagenet-resnet50-nus",
    "imagenet-resnet50-mlperf",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a network with a large batch on all devices.

    Sizes count examples over all devices of all processes together, and each device takes an equal
    share; only --microbatch-size counts the examples of one device, whose memory it is about.

    Attributes:
        config: Named configuration that gives every option below its default. The file
            train/configs/ says what to run and what to expect of it.
        dataset: digits, fashion-mnist, imagenet2012, or what tensorflow-datasets calls a data set
            for image classification that `python -m train.prepare` has prepared: NAME,
            NAME/CONFIGURATION, each with :VERSION or without.
        model: Name of the network; train/models/ has one file per family.
        image_size: Height and width of what the network sees, in pixels. None: what is usual for
            the data set.
        augmentation: What is done to the images to train on. crop: a random part, resized. shift:
            moved by up to an eighth of the height. flip: mirrored half of the time, which turns
            some characters into others. auto: what suits the data set.
        dtype: Numbers that the network computes with. Parameters, gradients, norms and the
            optimizer are float32 in any case.
        dropout_rate: Share of values that dropout sets to zero, where the paper of the network has
            it: DenseNet, MobileNet.
        zero_init_residual: The last BatchNorm scale of every residual block starts at 0, so that
            the block begins as the identity.
        norm_momentum: Decay rate of BatchNorm's running averages, per step. A run of few steps
            wants a small one, and large batches allow it.
        bn_group: Devices that take their BatchNorm statistics together. 1: each its own. None: all
            of them. It must divide the number of devices.
        optimizer: clars: layer-wise rates from the mean norm of the per-example gradients. lars:
            from the norm of the mean gradient (plus decay), all else as clars. optax-lars:
            Optax's, whose momentum buffer holds the rates too. lamb: layer-wise Adam. sgd: the same
            rate for every layer. lena: layer-wise warm-up from the gradients' variance. tvlars:
            lars with a factor that falls over time.
        learning_rate: Base learning rate, for a batch of 256 examples; the peak is this times
            batch-size / 256. None: what the configuration names for the optimizer.
        warmup_epochs: Epochs in which the learning rate rises linearly to the peak.
        schedule: What follows: polynomial: falls with power 2. cosine: falls along half a cosine.
            step: falls to a tenth at each of --decay-epochs. constant: stays.
        end_learning_rate: Where polynomial and cosine end.
        decay_epochs: Epochs at which the schedule "step" falls.
        batch_size: Examples per step.
        epochs: Length of the run, in passes over the training split.
        weight_decay: Coefficient of the weights in the gradient.
        weight_decay_mask: weights: biases and BatchNorm scales do not decay. all: they do, as in
            the code of CLARS's authors.
        momentum: Decay rate of the momentum buffer, per step.
        nesterov: Nesterov's momentum instead of the heavy ball's.
        trust_coefficient: Factor of the layers' trust ratios. None: what the optimizer's authors
            use.
        max_trust_ratio: Upper bound of the trust ratios. None: likewise.
        label_smoothing: Share of each label that is spread evenly over all classes.
        ema_decay: Decay rate per step of moving averages of the weights and of BatchNorm's running
            averages, which are then what is evaluated. None: no averages.
        group_size: For clars and lena: consecutive examples of a device whose mean gradient counts
            as one example's. With 1 it is the paper's formula, with 8 what its authors' code does.
        num_norm_examples: For clars and lena: examples of each batch whose gradient norms are
            taken, in equal parts on each device; the gradient is that of the whole batch. None:
            all.
        microbatch_size: Examples of one device that go through the network at a time, to save
            memory; BatchNorm takes its statistics over these. A device whose share of the batch is
            not larger takes it at once. None: the whole share.
        transfer_size: Examples that are copied to the devices at a time, over all devices, to save
            memory there and on the hosts. It must divide the batch. None: the whole batch.
        eval_epochs: Epochs between evaluations, each with a checkpoint. The end of the run has them
            in any case. The last two checkpoints and the best one are kept.
        checkpoint_steps: Steps between checkpoints besides. None: none besides.
        on_nonfinite: What happens where the loss, a gradient, a norm or a new weight is not finite.
            stop: the run ends, with a checkpoint of the state before. skip: the update is dropped,
            and counted in the metrics.
        max_nonfinite_steps: With skip: updates in a row that are dropped; one more ends the run.
        max_bad_examples: Examples of a split that a process may pass over because they cannot be
            decoded, or their label is out of range; one more ends the run. In training another
            example takes the place, in evaluation none does. They are counted in the metrics.
        seed: Seed of the initial parameters, of the order of the examples, of their augmentation
            and of dropout. The same seed gives the same numbers.
        workdir: Run folder, where configuration, metrics, curves and checkpoints go. None:
            runs/CONFIG-TIME, which only a single process can choose.
        resume: auto: a run folder that was begun with the same options goes on from its last
            checkpoint. never: the folder must be empty, or not there yet.
        data_dir: Folder of tensorflow-datasets, where the data set is prepared. None: what the
            variable TFDS_DATA_DIR names, or else ~/tensorflow_datasets.
        coordinator: For several processes: HOST:PORT of the process with index 0, with
            --num-processes and --process-id; or "auto" where the platform tells (a TPU pod slice,
            Slurm, Open MPI, Kubernetes). None: a single process.
        num_processes: Number of processes; left out with "auto".
        process_id: Index of this process, from 0; left out with "auto".
        join_seconds: Seconds to wait at the start until all processes are there.
        learning_rates: `learning_rate` by optimizer where none is given; set by the named
            configuration alone.
    """

    config: Positional[ConfigName] = "digits"
    dataset: str = "digits"
    model: str = "resnet8"
    image_size: int | None = None
    augmentation: Literal["auto", AugmentationName] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    dropout_rate: float = 0.0
    zero_init_residual: bool = False
    norm_momentum: float = 0.9
    bn_group: int | None = None
    optimizer: OptimizerName = "clars"
    learning_rate: float | None = None
    warmup_epochs: float = 0.0
    schedule: ScheduleName = "polynomial"
    end_learning_rate: float = 0.0
    decay_epochs: tuple[float, ...] = ()
    batch_size: int = 256
    epochs: float = 10.0
    weight_decay: float = 1e-4
    weight_decay_mask: Literal["weights", "all"] = "weights"
    momentum: float = 0.9
    nesterov: bool = False
    trust_coefficient: float | None = None
    max_trust_ratio: float | None = None
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    group_size: int = 1
    num_norm_examples: int | None = None
    microbatch_size: int | None = None
    transfer_size: int | None = None
    eval_epochs: float = 1.0
    checkpoint_steps: int | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite_steps: int = 10
    max_bad_examples: int = 0
    seed: int = 0
    workdir: Path | None = None
    resume: Literal["auto", "never"] = "auto"
    data_dir: Path | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_seconds: int = 300
    learning_rates: Suppress[Mapping[OptimizerName, float]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def base_learning_rate(self) -> float:
        """`learning_rate`, or what the configuration names for the optimizer."""
        if self.learning_rate is None:
            return self.learning_rates[self.optimizer]
        return self.learning_rate

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate of the run, in proportion to the batch."""
        return self.base_learning_rate * self.batch_size / 256

    def num_steps(self, num_train: int) -> int:
        """Counts the steps of a run, rounded up; batches run on across the end of a pass.

        Args:
            num_train: examples of the training split.
        """
        return -(-round(self.epochs * num_train) // self.batch_size)

    def in_steps(self, epochs: float, num_train: int) -> int:
        """Counts the whole steps that come closest to a number of epochs."""
        return round(epochs * num_train / self.batch_size)
