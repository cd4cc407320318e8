"""The parts of Faster and Mask R-CNN as detectron2 0.6 trains them, where torchvision's own differ.

Published numbers depend on them: torchvision rounds anchors and guesses strides, samples regions half a pixel aside,
takes a smooth L1 for the boxes, and starts its heads otherwise.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import box_area, roi_align

RATIOS = (0.5, 1.0, 2.0)
"""Height / width of anchors."""
CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4
"""A box of this size, in pixels, is looked at on the level of stride 2^4. source: FPN, arXiv 1612.03144, equation 1"""


KEY = "key"
"""Of a target: an image's number at this step, which alone decides what is drawn for it, whatever its neighbours and
however many ranks there are. Without one, torch's own generator decides."""
OF_SIZE, OF_ANCHORS, OF_REGIONS = 0, 1, 2
"""Kinds of draws."""


@contextmanager
def drawn_by(key: Tensor | None, kind: int, device: torch.device) -> Iterator[None]:
    """What is drawn meanwhile is a function of key and kind; torch's generators stay where they are."""
    if key is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(4 * int(key) + kind)
        yield


class Sampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]
    """torchvision's, which draws the samples of each image by its key."""

    def __init__(self, like: BalancedPositiveNegativeSampler, kind: int) -> None:
        super().__init__(like.batch_size_per_image, like.positive_fraction)
        self.kind = kind
        self.keys: list[Tensor | None] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """labels: (N,) of each image's anchors or regions; returns masks of those on objects, and of those beside"""
        on_object, beside = [], []
        for key, of_image in zip(self.keys, labels, strict=True):
            with drawn_by(key, self.kind, of_image.device):
                positive, negative = super().__call__([of_image])
            on_object += positive
            beside += negative
        return on_object, beside


class Resize(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Normalise; resize the shorter side, and boxes and masks with it; pad a batch to multiples of 32."""

    def __init__(
        self,
        train_sizes: tuple[int, ...],
        test_size: int,
        max_size: int,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__(train_sizes, max_size, list(mean), list(std))
        self.test_size = test_size

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """One image, (3, H, W); with antialiasing, as PIL resizes, where torchvision has none."""
        with drawn_by((target or {}).get(KEY), OF_SIZE, image.device):
            shorter = self.torch_choice(self.min_size) if self.training else self.test_size
        was = image.shape[-2:]
        scale = min(shorter / min(was), self.max_size / max(was))
        size = [round(side * scale) for side in was]
        image = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], was, size)
            if "masks" in target:
                target["masks"] = F.interpolate(target["masks"][:, None], size=size, mode="nearest-exact")[:, 0]
        return image, target


class Anchors(nn.Module):
    """Every level's anchors, centred on the multiples of its stride."""

    def __init__(self, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...]) -> None:
        """sizes: of each level, in pixels: the square roots of its anchors' areas"""
        super().__init__()
        self.sizes, self.strides = sizes, strides

    def num_an_place(self) -> int:
        """How many anchors stand on one place of a map."""
        return len(self.sizes[0]) * len(RATIOS)

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """(N, 4) as x0 y0 x1 y1, for every image the same; the levels, their rows, places and anchors in this order."""
        levels = zip(self.sizes, self.strides, maps, strict=True)
        anchors = torch.cat([_grid(sizes, stride, each) for sizes, stride, each in levels])
        return [anchors] * len(images.image_sizes)


def _grid(sizes: tuple[int, ...], stride: int, level: Tensor) -> Tensor:
    ratios, sides = level.new_tensor(RATIOS, dtype=torch.float32), level.new_tensor(sizes, dtype=torch.float32)
    width, height = torch.outer(ratios**-0.5, sides).flatten(), torch.outer(ratios**0.5, sides).flatten()
    cell = torch.stack([-width, -height, width, height], dim=1) / 2
    rows, columns = (stride * torch.arange(size, device=level.device) for size in level.shape[-2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centres = torch.stack([x, y, x, y], dim=-1)
    return (centres[:, :, None] + cell).view(-1, 4)


class RoIPool(nn.Module):
    """What a map shows inside each box, from the level that suits the box's size; half-pixel exact."""

    def __init__(self, output_size: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.output_size, self.strides = output_size, strides

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """(number of boxes, C, output_size, output_size)

        maps: finest first; those beyond the strides are for proposals only
        boxes: (N, 4) of each image, in its pixels
        """
        regions = torch.cat([F.pad(each, (1, 0), value=image) for image, each in enumerate(boxes)])
        sizes = box_area(regions[:, 1:]).sqrt()
        levels = (CANONICAL_LEVEL + torch.log2(sizes / CANONICAL_SIZE + 1e-8)).floor()
        levels = levels.clamp(math.log2(self.strides[0]), math.log2(self.strides[-1]))
        finest = next(iter(maps.values()))
        pooled = finest.new_zeros(len(regions), finest.shape[1], self.output_size, self.output_size)
        for stride, level in zip(self.strides, maps.values(), strict=False):
            here = levels == math.log2(stride)
            sampled = roi_align(level, regions[here], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled[here] = sampled.to(pooled.dtype)
        return pooled


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's, with the published losses."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.fg_bg_sampler: Sampler = Sampler(self.fg_bg_sampler, OF_ANCHORS)

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of each image, and in training the losses."""
        self.fg_bg_sampler.keys = [target.get(KEY) for target in targets or ()]
        proposals: tuple[list[Tensor], dict[str, Tensor]] = super().forward(images, features, targets)
        return proposals

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the sampled anchors and L1 of those on objects, over the number to be sampled.

        objectness: (N, 1), deltas: (N, 4), of all images' anchors together
        labels: 1, 0, or -1 for neither, regression_targets: (., 4), of each image's anchors
        """
        on_object, beside = (torch.cat(each).bool() for each in self.fg_bg_sampler(labels))
        sampled, wanted = on_object | beside, torch.cat(regression_targets)
        number = len(labels) * self.fg_bg_sampler.batch_size_per_image
        cross_entropy = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        return cross_entropy / number, F.l1_loss(deltas[on_object], wanted[on_object], reduction="sum") / number


class Heads(RoIHeads):  # type: ignore[misc]
    """torchvision's, with the published losses."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.fg_bg_sampler: Sampler = Sampler(self.fg_bg_sampler, OF_REGIONS)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The losses when training, else each image's detections."""
        if not self.training:
            detections: tuple[list[dict[str, Tensor]], dict[str, Tensor]]
            detections = super().forward(features, proposals, image_shapes)
            return detections
        assert targets is not None
        self.fg_bg_sampler.keys = [target.get(KEY) for target in targets]
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        scores, deltas = self.box_predictor(self.box_head(pooled))
        losses = box_losses(scores, deltas, torch.cat(labels), torch.cat(wanted))
        if self.has_mask():
            positive = [each > 0 for each in labels]
            boxes = [each[chosen] for each, chosen in zip(proposals, positive, strict=True)]
            objects = [each[chosen] for each, chosen in zip(matched, positive, strict=True)]
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
            losses["loss_mask"] = mask_loss(logits, boxes, objects, targets)
        return [], losses


def box_losses(scores: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the regions' classes, and L1 of the boxes of those on objects over the number of all regions.

    scores: (N, classes), class 0 for none; deltas: (N, 4 classes); labels: (N,); wanted: (N, 4)
    """
    on_object = labels.nonzero().squeeze(1)
    of_class = deltas.view(len(deltas), -1, 4)[on_object, labels[on_object]]
    distance = F.l1_loss(of_class, wanted[on_object], reduction="sum")
    return {"loss_classifier": F.cross_entropy(scores, labels), "loss_box_reg": distance / len(labels)}


def mask_loss(logits: Tensor, boxes: list[Tensor], objects: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """Cross-entropy of the mask of every region's class.

    logits: (N, classes, S, S); boxes and objects: of each image's regions on objects, and which of its objects
    """
    each_image = list(zip(boxes, objects, targets, strict=True))
    labels = torch.cat([target["labels"][chosen] for _, chosen, target in each_image])
    size = logits.shape[-1]
    wanted = [_mask_in_box(target["masks"][chosen], box, size) for box, chosen, target in each_image]
    of_class = logits[torch.arange(len(labels), device=logits.device), labels]
    return F.binary_cross_entropy_with_logits(of_class, torch.cat(wanted))


def _mask_in_box(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(N, H, W) masks inside their boxes (N, 4): (N, size, size), 0 or 1."""
    numbers = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    regions = torch.cat([numbers[:, None], boxes], dim=1)
    inside = roi_align(masks[:, None].to(boxes.dtype), regions, size, 1.0, sampling_ratio=0, aligned=True)
    masks_inside: Tensor = (inside[:, 0] >= 0.5).to(boxes.dtype)
    return masks_inside


@torch.no_grad()
def initialise_heads(heads: Heads) -> None:
    """Draw the weights as detectron2 0.6: Xavier-uniform hidden layers, nearly nothing in the last ones."""
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.kaiming_uniform_(layer.weight, a=1)  # fan-in only: its c2_xavier_fill
    nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.01)
    nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.001)
    if heads.has_mask():
        nn.init.normal_(heads.mask_predictor.mask_fcn_logits.weight, std=0.001)
    for name, parameter in heads.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
