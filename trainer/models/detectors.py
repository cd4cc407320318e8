"""Faster and Mask R-CNN with a feature pyramid on any timm network that has feature maps, from torchvision's parts."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from trainer.models.rcnn import Anchors, Heads, ProposalNetwork, Resize, RoIPool, initialise_heads

PYRAMID_CHANNELS = 256


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
    regions: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    bf16: bool = False,
) -> GeneralizedRCNN:
    """The detector around a network, which keeps its weights; nothing is frozen.

    num_classes: without the background
    train_sizes, test_size, max_size: pixels of the shorter side, one drawn an image; of the longer side at most
    regions: of an image that the box head trains on
    bf16: the network and its pyramid run under bfloat16 autocast; boxes need more digits
    raises: ValueError for a network without maps at strides 4 to 32 (MobileNets and EfficientNets: 16 and 32)
    """
    stages = Stages(network)
    pyramid = MOBILENET if hasattr(network, "conv_head") else RESNET
    stages.take(pyramid.strides)
    stages.check()
    return GeneralizedRCNN(
        PyramidBackbone(stages, bf16=bf16),
        _proposals(pyramid),
        _heads(pyramid, num_classes + 1, regions=regions, masks=masks),
        Resize(train_sizes, test_size, max_size, mean=mean, std=std),
    )


def _proposals(pyramid: Pyramid) -> ProposalNetwork:
    """source: detectron2 0.6 Base-RCNN-FPN, and SSLight's counts"""
    anchors = Anchors(pyramid.anchor_sizes, (*pyramid.strides, 2 * pyramid.strides[-1]))
    return ProposalNetwork(
        anchors,
        RPNHead(PYRAMID_CHANNELS, anchors.num_an_place()),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": pyramid.proposals, "testing": 1000},
        nms_thresh=0.7,
    )


def _heads(pyramid: Pyramid, num_classes: int, *, regions: int, masks: bool) -> Heads:
    """num_classes: with the background. source: detectron2 0.6 Base-RCNN-FPN"""
    heads = Heads(
        RoIPool(7, pyramid.strides),
        TwoMLPHead(PYRAMID_CHANNELS * 7 * 7, 1024),
        FastRCNNPredictor(1024, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=regions,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    if masks:
        heads.mask_roi_pool = RoIPool(14, pyramid.strides)
        heads.mask_head = MaskRCNNHeads(PYRAMID_CHANNELS, (256, 256, 256, 256), dilation=1)
        heads.mask_predictor = MaskRCNNPredictor(256, 256, num_classes)
    initialise_heads(heads)
    return heads


class Stages(nn.Module):
    """A timm network's feature maps, finest first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        info = getattr(network, "feature_info", None)
        if not hasattr(network, "forward_intermediates") or info is None:
            raise ValueError(f"{type(network).__name__} gives no feature maps (timm's forward_intermediates)")
        self.network = network
        self.infos: list[dict[str, int]] = [dict(each) for each in getattr(info, "info", info)]
        self.has_final_convolution = isinstance(getattr(network, "conv_head", None), nn.Conv2d) and hasattr(
            network, "bn2"
        )
        """EfficientNets and MobileNetV2 widen the last map once more, and the published detectors use that; what
        MobileNetV3 widens is pooled already."""
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

    @torch.no_grad()
    def check(self) -> None:
        """raises: ValueError if the network takes images of one size only"""
        was_training, device = self.training, next(self.parameters()).device
        try:
            self.eval()(torch.zeros(1, 3, 96, 160, device=device))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{type(self.network).__name__} takes no image of 96 x 160 pixels, and a detector needs images of any "
                f"size: {error}"
            ) from error
        finally:
            self.train(was_training)

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

    def __init__(self, stages: Stages, *, bf16: bool = False) -> None:
        super().__init__()
        self.stages, self.bf16 = stages, bf16
        self.fpn = FeaturePyramidNetwork(stages.channels, PYRAMID_CHANNELS, extra_blocks=LastLevelMaxPool())
        self.out_channels = PYRAMID_CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> a (B, 256, h, w) map a level, by name, in fp32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            named = OrderedDict((str(index), each) for index, each in enumerate(self.stages(images)))
            pyramid: dict[str, Tensor] = self.fpn(named)
        return {name: level.float() for name, level in pyramid.items()}


class DetectionObjective(nn.Module):
    """A detector's losses as one, which is what an engine wraps; in eval mode, its detections."""

    def __init__(self, detector: GeneralizedRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses, and each under its name."""
        losses: dict[str, Tensor] = self.detector(images, targets)
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, labels, scores (and masks) of each image, in its own pixels, at the test size."""
        found: list[dict[str, Tensor]] = self.detector.eval()(images)
        return found
