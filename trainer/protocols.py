"""Settings of the evaluation protocols, with their published values, and the check that recipe blocks share."""

from dataclasses import dataclass
from typing import Any, Literal


def at_least(block: Any, **limits: float) -> None:
    """ValueError if a field of the block lies below its limit."""
    for name, limit in limits.items():
        if getattr(block, name) < limit:
            raise ValueError(f"{name} must be at least {limit}, got {getattr(block, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class KNN:
    """Weighted k-nearest-neighbour accuracy of val images among the train images' features."""

    every_epochs: int
    """During training; 0 for never."""
    k: int = 20
    temperature: float = 0.07
    size: int = 224
    """Pixels of the images of every protocol but detection."""
    resize: int = 256
    """The shorter side is resized to this before the centre crop of `size`."""
    batch_size: int = 256
    """Images a rank."""

    def __post_init__(self) -> None:
        at_least(self, every_epochs=0, k=1, batch_size=1, size=8, resize=self.size)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeEval:
    """Accuracy of the joint probe on val images, which are read as k-NN reads them."""

    every_epochs: int
    """0 for never; without `probe: true` there is nothing to evaluate."""

    def __post_init__(self) -> None:
        at_least(self, every_epochs=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LowShot:
    """Logistic regression on the features of very few images of each class.

    source: MSN, arXiv 2204.07141; its λ / n
    """

    images_per_class: tuple[int, ...] = (1, 2, 5)
    splits: int = 3
    """Random choices of those images; the report has their mean and standard deviation."""
    penalty: float = 2.5e-4
    """λ; the weight decay is λ over the number of training images."""

    def __post_init__(self) -> None:
        at_least(self, splits=1)
        if not self.images_per_class or min(self.images_per_class) < 1:
            raise ValueError(f"images_per_class must name numbers of at least 1, got {self.images_per_class}")
        if not self.penalty > 0:
            raise ValueError(f"penalty must be above 0, got {self.penalty}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """Training a classifier on a network: what is trained, how long, and on which crops. Sizes are those of `knn`."""

    trains: Literal["head", "all"] = "head"
    """head: the network is frozen and in eval mode."""
    head: Literal["linear", "norm_linear", "projection"] = "linear"
    """norm_linear: a BatchNorm before the layer; projection: the layers of the run's
    projection head but its last, and a linear one on them."""
    optimizer: Literal["lars", "sgd"] = "sgd"
    nesterov: bool = False
    epochs: int = 100
    global_batch: int = 1024
    base_lr: float = 0.01
    """For a global batch of 256."""
    sweep: tuple[float, ...] = ()
    """The base_lr of further heads on the same frozen features, trained in the same pass, each as if alone."""
    rate: Literal["base_lr", "held_out", "val"] = "base_lr"
    """Whose head the result is. held_out: of `sweep` and base_lr the rate that is best on a tenth of the train images,
    by heads trained on the others, which takes as long again; val: the best on the val images, which flatters."""
    final_lr: float = 1e-6
    """Where the cosine ends; it moves once an epoch."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the rate falls to a tenth, instead of the cosine."""
    head_lr_factor: float = 1.0
    """The head learns so many times as fast as the network."""
    weight_decay: float = 0.0
    crop: Literal["random", "squash"] = "random"
    """Of train images, which are flipped every second time; squash: all of the image, of val images too."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest fraction of the image's area that a random crop takes."""
    select: Literal["last", "best"] = "last"
    """Which epoch counts; best: the best on the val images, as published, which flatters."""
    repeats: int = 1
    """Trainings with seeds one apart; the report has their mean and standard deviation."""

    def __post_init__(self) -> None:
        at_least(self, epochs=1, global_batch=1, final_lr=0, weight_decay=0, repeats=1)
        if not self.base_lr > 0:
            raise ValueError(f"base_lr must be above 0, got {self.base_lr}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be a lower and an upper fraction in (0, 1], got {list(self.scale)}")
        if any(milestone >= self.epochs for milestone in self.milestones):
            raise ValueError(
                f"milestones {list(self.milestones)} lie behind the last of {self.epochs} epochs, so that the rate "
                "would not fall; give milestones too, or [] for a cosine"
            )
        if not all(rate > 0 for rate in self.sweep):
            raise ValueError(f"sweep must name learning rates above 0, got {list(self.sweep)}")
        if self.sweep and self.trains == "all":
            raise ValueError(
                f"sweep trains many heads on one frozen network, got {list(self.sweep)} with trains: all, where every "
                "rate changes the network; evaluate once for each base_lr, or set trains: head"
            )
        if self.rate != "base_lr" and not self.sweep:
            raise ValueError(f"rate is {self.rate}, and there is nothing to choose among; name learning rates in sweep")

    @property
    def rates(self) -> tuple[float, ...]:
        """Of every head its base_lr, each once; the protocol's own comes first."""
        return tuple(dict.fromkeys((self.base_lr, *self.sweep)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Classification):
    """The linear probe of convolutional networks. source: SSLight classification/, which reports the best epoch."""

    optimizer: Literal["lars", "sgd"] = "lars"
    global_batch: int = 4096
    base_lr: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearViT(Classification):
    """The linear probe of ViTs, on the class tokens of the last four blocks. source: SSLight classification/"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Semi1(Classification):
    """Fine-tuning on SimCLR's 1 % of ImageNet, from the projection head. source: SSLight, semi-supervised"""

    trains: Literal["head", "all"] = "all"
    head: Literal["linear", "norm_linear", "projection"] = "projection"
    nesterov: bool = True
    epochs: int = 60
    base_lr: float = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Semi10(Semi1):
    """The same on 10 %."""

    epochs: int = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuning(Classification):
    """The whole network on another task. No paper of ours fixes it: batch, rate and decay are those of VISSL's."""

    trains: Literal["head", "all"] = "all"
    nesterov: bool = True
    epochs: int = 50
    global_batch: int = 256
    weight_decay: float = 5e-4
    head_lr_factor: float = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer(Classification):
    """A linear probe on another data set. source: VISSL's transfer settings, as RoB uses them; here CIFAR's"""

    head: Literal["linear", "norm_linear", "projection"] = "norm_linear"
    nesterov: bool = True
    epochs: int = 28
    milestones: tuple[int, ...] = (8, 16, 24)
    global_batch: int = 256
    weight_decay: float = 5e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Places205(Transfer):
    """Transfer to Places205."""

    epochs: int = 14
    milestones: tuple[int, ...] = (4, 8, 12)


@dataclass(frozen=True, kw_only=True, slots=True)
class INaturalist18(Transfer):
    """Transfer to iNaturalist 2018."""

    epochs: int = 84
    milestones: tuple[int, ...] = (24, 48, 72)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClevrCount(Transfer):
    """How many objects are in a CLEVR scene, as 8 classes; a cosine instead of milestones, and images whole."""

    epochs: int = 50
    milestones: tuple[int, ...] = ()
    final_lr: float = 1e-4
    crop: Literal["random", "squash"] = "squash"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClevrDist(ClevrCount):
    """How far its nearest object is, as 6 classes."""

    epochs: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """Faster or Mask R-CNN with a feature pyramid, the 1x schedule. source: SSLight detection/, detectron2 0.6"""

    steps: int = 90_000
    """The rate falls to a tenth after 2/3 and 8/9 of them."""
    global_batch: int = 16
    base_lr: float = 0.02
    """For a global batch of 16."""
    warmup_steps: int = 1000
    weight_decay: float = 1e-4
    train_sizes: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Pixels of the shorter side; one is drawn for each image."""
    test_size: int = 800
    max_size: int = 1333
    """Of the longer side."""
    regions: int = 512
    """Proposals of an image that its boxes' head trains on, a quarter of them on objects."""
    num_workers: int = 4
    """Processes a rank that read images; 0 for none."""
    log_every_steps: int = 50
    save_every_steps: int = 1000
    """Where a training that was stopped goes on."""

    def __post_init__(self) -> None:
        at_least(self, steps=1, global_batch=1, base_lr=0, warmup_steps=0, weight_decay=0, test_size=32, max_size=32)
        at_least(self, regions=4, num_workers=0, log_every_steps=1, save_every_steps=1)
        if not self.train_sizes or min(self.train_sizes) < 32:
            raise ValueError(f"train_sizes must name sizes of 32 pixels or more, got {self.train_sizes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evals:
    """Evaluations during training, and the settings of every `trainer evaluate`."""

    knn: KNN
    probe: ProbeEval = ProbeEval(every_epochs=1)
    lowshot: LowShot = LowShot()
    linear: Linear = Linear()
    linear_vit: LinearViT = LinearViT()
    """Settings of `linear` for vision transformers."""
    semi1: Semi1 = Semi1()
    semi10: Semi10 = Semi10()
    finetune: FineTuning = FineTuning()
    transfer: Transfer = Transfer()
    places205: Places205 = Places205()
    inaturalist18: INaturalist18 = INaturalist18()
    clevr_count: ClevrCount = ClevrCount()
    clevr_dist: ClevrDist = ClevrDist()
    detection: Detection = Detection()
    """Of `segmentation` too."""
    bf16: bool = False
    """Networks run under bfloat16 autocast; weights, statistics, votes, and of detectors all behind the feature
    pyramid, stay in fp32."""


CLASSIFICATIONS = (
    *("linear", "semi1", "semi10", "finetune"),
    *("transfer", "places205", "inaturalist18", "clevr_count", "clevr_dist"),
)
DETECTIONS = ("detection", "segmentation")
EVALS = ("knn", "linear_cached", "linear_online", "lowshot", "collapse", *CLASSIFICATIONS, *DETECTIONS)
"""Every protocol of `trainer evaluate`."""
