"""Faster and Mask R-CNN with a feature pyramid on any timm network that has feature maps, from torchvision's parts."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

PYRAMID_CHANNELS = 256
RATIOS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Pyramid:
    """Which maps of a network the pyramid stands on, and the anchors of its levels.

    source: SSLight detection/ (detectron2 FPN configurations)
    """

    strides: tuple[int, ...]
    anchor_sizes: tuple[tuple[int, ...], ...]
    """One tuple a level, in pixels; the last level is a pooled one above the coarsest map."""
    proposals: int
    """Kept after suppression in training."""


RESNET = Pyramid(strides=(4, 8, 16, 32), anchor_sizes=((32,), (64,), (128,), (256,), (512,)), proposals=1000)
MOBILENET = Pyramid(strides=(16, 32), anchor_sizes=((32, 64, 128), (64, 128, 256), (128, 256, 512)), proposals=2000)


def build_detector(
    network: nn.Module,
    *,
    num_classes: int,
    masks: bool,
    train_sizes: tuple[int, ...],
    test_size: int,
    max_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> FasterRCNN:
    """The detector around a network, which keeps its weights; nothing is frozen.

    num_classes: without the background
    train_sizes, test_size, max_size: pixels of the shorter side, one drawn an image; of the longer side at most
    raises: ValueError for a network without maps at strides 4 to 32, or at least 16 and 32
    """
    stages = Stages(network)
    pyramid = MOBILENET if stages.has_final_convolution else RESNET
    stages.take(pyramid.strides)
    levels = [str(index) for index in range(len(pyramid.strides))]
    settings = {
        "min_size": train_sizes,
        "max_size": max_size,
        "image_mean": list(mean),
        "image_std": list(std),
        "rpn_anchor_generator": AnchorGenerator(pyramid.anchor_sizes, (RATIOS,) * len(pyramid.anchor_sizes)),
        "rpn_pre_nms_top_n_train": 2000,
        "rpn_pre_nms_top_n_test": 1000,
        "rpn_post_nms_top_n_train": pyramid.proposals,
        "rpn_post_nms_top_n_test": 1000,
        "box_roi_pool": MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
    }
    body = PyramidBackbone(stages)
    if not masks:
        detector: FasterRCNN = FasterRCNN(body, num_classes + 1, **settings)
    else:
        roi_pool = MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2)
        detector = MaskRCNN(body, num_classes + 1, mask_roi_pool=roi_pool, **settings)
    detector.test_size = test_size
    return detector


class Stages(nn.Module):
    """A timm network's feature maps, finest first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        info = getattr(network, "feature_info", None)
        if not hasattr(network, "forward_intermediates") or info is None:
            raise ValueError(f"{type(network).__name__} gives no feature maps (timm's forward_intermediates)")
        self.network = network
        self.infos: list[dict[str, int]] = [dict(each) for each in getattr(info, "info", info)]
        self.has_final_convolution = hasattr(network, "conv_head")
        """EfficientNets and MobileNets widen the last map once more, and the published detectors use that."""
        self.indices: list[int] = []

    def take(self, strides: tuple[int, ...]) -> None:
        """Choose the deepest map of each stride."""
        by_stride = {each["reduction"]: index for index, each in enumerate(self.infos)}
        if missing := [stride for stride in strides if stride not in by_stride]:
            raise ValueError(
                f"{type(self.network).__name__} has feature maps at strides {sorted(by_stride)} and a detector needs "
                f"{list(strides)}, missing {missing}; use a network with a pyramid, such as a ResNet or MobileNet"
            )
        self.indices = [by_stride[stride] for stride in strides]

    @property
    def channels(self) -> list[int]:
        """Of each map."""
        channels = [self.infos[index]["num_chs"] for index in self.indices]
        if self.has_final_convolution:
            channels[-1] = int(self.network.conv_head.out_channels)  # type: ignore[union-attr, arg-type]
        return channels

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one (B, C_i, H / stride_i, W / stride_i) a stride."""
        maps: list[Tensor] = self.network.forward_intermediates(  # type: ignore[operator]
            images, indices=self.indices, intermediates_only=True
        )
        if self.has_final_convolution:
            maps = [*maps[:-1], self.network.bn2(self.network.conv_head(maps[-1]))]  # type: ignore[operator]
        return maps


class PyramidBackbone(nn.Module):
    """Stages and a feature pyramid, as torchvision's detectors take them; no norm in the pyramid."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.stages = stages
        self.fpn = FeaturePyramidNetwork(stages.channels, PYRAMID_CHANNELS, extra_blocks=LastLevelMaxPool())
        self.out_channels = PYRAMID_CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> a (B, 256, h, w) map a level, by name."""
        named = OrderedDict((str(index), each) for index, each in enumerate(self.stages(images)))
        pyramid: dict[str, Tensor] = self.fpn(named)
        return pyramid


class DetectionObjective(nn.Module):
    """A detector's losses as one, which is what an engine wraps; in eval mode, its detections."""

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses, and each under its name."""
        losses: dict[str, Tensor] = self.detector(images, targets)
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, labels, scores (and masks) of each image, in its own pixels, at the test size."""
        transform = self.detector.transform
        train_sizes, transform.min_size = transform.min_size, (self.detector.test_size,)
        try:
            found: list[dict[str, Tensor]] = self.detector.eval()(images)
        finally:
            transform.min_size = train_sizes
        return found
