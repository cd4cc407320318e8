"""Detectors stand on the published maps, anchors and counts, and train as detectron2 0.6 does."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from trainer.models.detectors import MOBILENET, RESNET, DetectionObjective, Stages, build_detector
from trainer.models.rcnn import Anchors, Heads, ProposalNetwork, Resize, RoIPool, Sampler, box_losses, mask_loss

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
TINY_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8, "zero_init_last": False}


def detector(network: nn.Module, *, masks: bool = False, **settings: Any) -> nn.Module:
    sizes = {"train_sizes": (64,), "test_size": 64, "max_size": 96, "regions": 16}
    return build_detector(network, num_classes=2, masks=masks, mean=MEAN, std=STD, **(sizes | settings))


def tiny(**settings: Any) -> nn.Module:
    return detector(timm.create_model("resnet18", num_classes=0, **TINY_RESNET), **settings)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "strides", "channels"),
    [
        ("resnet18", (4, 8, 16, 32), [64, 128, 256, 512]),
        ("resnet34", (4, 8, 16, 32), [64, 128, 256, 512]),
        ("mobilenetv2_100", (16, 32), [96, 1280]),  # with the last convolution, as published
        ("efficientnet_lite0", (16, 32), [112, 1280]),
        ("mobilenetv3_small_050", (16, 32), [24, 288]),  # what it widens once more is pooled already
        ("convnext_atto", (4, 8, 16, 32), [40, 80, 160, 320]),
    ],
)
def test_the_pyramid_stands_on_the_published_maps(name: str, strides: tuple[int, ...], channels: list[int]) -> None:
    stages = Stages(timm.create_model(name, num_classes=0))
    stages.take((MOBILENET if len(strides) == 2 else RESNET).strides)
    with torch.no_grad():
        maps = stages.eval()(random(1, 3, 64, 96))
    assert stages.channels == channels
    assert [each.shape[1:] for each in maps] == [
        (width, 64 // stride, 96 // stride) for width, stride in zip(channels, strides, strict=True)
    ]


def test_the_last_map_of_mobilenetv2_is_the_one_that_its_features_are_the_mean_of() -> None:
    network = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    stages = Stages(network)
    stages.take(MOBILENET.strides)
    images = random(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(stages(images)[-1].mean((2, 3)), network(images), atol=1e-6)


def test_networks_that_take_images_of_one_size_only_are_refused_and_others_are_left_as_they_were() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1, 1, 1), embed_dim=24)
    with pytest.raises(ValueError, match="takes no image of 96 x 160 pixels"):
        detector(swin)
    resnet = timm.create_model("resnet18", num_classes=0)
    before = {key: value.clone() for key, value in resnet.state_dict().items()}
    assert detector(resnet).training
    assert resnet.training
    assert all(torch.equal(value, before[key]) for key, value in resnet.state_dict().items())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit"])
def test_a_vision_transformer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"has feature maps at strides \[16\] and a detector needs \[4, 8, 16, 32\]"):
        detector(timm.create_model(name, num_classes=0))


def test_what_is_no_network_of_timm_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear gives no feature maps"):
        detector(nn.Linear(3, 3))


def anchors_by_detectron2(sizes: tuple[int, ...], stride: int, height: int, width: int) -> list[list[float]]:
    """Its DefaultAnchorGenerator, offset 0, as loops; sorted."""
    boxes = []
    for row in range(height):
        for column in range(width):
            for size in sizes:
                for ratio in (0.5, 1.0, 2.0):
                    w = math.sqrt(size**2 / ratio)
                    h = ratio * w
                    x, y = column * stride, row * stride
                    boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return sorted(boxes)


@pytest.mark.parametrize("pyramid", [RESNET, MOBILENET], ids=["resnet", "mobilenet"])
def test_anchors_are_detectron2s_where_a_map_has_an_odd_side_too(pyramid: Any) -> None:
    strides = (*pyramid.strides, 64)
    maps = [torch.zeros(1, 1, math.ceil(96 / stride), math.ceil(160 / stride)) for stride in strides]
    anchors = Anchors(pyramid.anchor_sizes, strides)
    ours, same = anchors(ImageList(torch.zeros(2, 3, 96, 160), [(96, 160)] * 2), maps)
    expected: list[list[float]] = []
    begin = 0
    for sizes, stride, each in zip(pyramid.anchor_sizes, strides, maps, strict=True):
        expected = anchors_by_detectron2(sizes, stride, *each.shape[-2:])
        level = ours[begin : begin + len(expected)]
        assert torch.allclose(torch.tensor(sorted(level.tolist())), torch.tensor(expected), atol=1e-3)
        begin += len(expected)
    assert begin == len(ours)
    assert same is ours


def test_anchors_stand_where_the_proposal_network_takes_them_to_be() -> None:
    """Its head's output is read in the order rows, places, anchors."""
    (ours,) = Anchors(((32, 64),), (8,))(ImageList(torch.zeros(1, 3, 16, 24), [(16, 24)]), [torch.zeros(1, 1, 2, 3)])
    centres = (ours[:, :2] + ours[:, 2:]).view(2, 3, 6, 2) / 2
    assert torch.equal(centres[1, 2], torch.tensor([16.0, 8.0]).expand(6, 2))
    assert torch.equal(centres[0, 1], torch.tensor([8.0, 0.0]).expand(6, 2))


@pytest.mark.parametrize(("name", "proposals", "an_place"), [("resnet18", 1000, 3), ("mobilenetv2_100", 2000, 9)])
def test_proposals_and_regions_are_counted_as_published(name: str, proposals: int, an_place: int) -> None:
    built: Any = detector(timm.create_model(name, num_classes=0), masks=True, regions=512)
    assert built.rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert built.rpn._post_nms_top_n == {"training": proposals, "testing": 1000}
    assert built.rpn.head.cls_logits.out_channels == an_place
    assert (built.rpn.fg_bg_sampler.batch_size_per_image, built.rpn.nms_thresh) == (256, 0.7)
    heads = built.roi_heads
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert (heads.box_roi_pool.output_size, heads.mask_roi_pool.output_size) == (7, 14)
    assert built.transform.size_divisible == 32


def test_nothing_is_frozen_and_the_networks_weights_are_kept() -> None:
    network = timm.create_model("resnet18", num_classes=0, **TINY_RESNET)
    before = network.conv1.weight.clone()
    built = detector(network)
    assert all(parameter.requires_grad for parameter in built.parameters())
    assert torch.equal(dict(built.named_parameters())["backbone.stages.network.conv1.weight"], before)


def test_heads_start_as_detectron2s() -> None:
    torch.manual_seed(0)
    heads = dict(tiny(masks=True).roi_heads.named_parameters())  # type: ignore[union-attr]
    expected = {
        "box_head.fc6.weight": 1 / math.sqrt(256 * 49),
        "box_predictor.cls_score.weight": 0.01,
        "box_predictor.bbox_pred.weight": 0.001,
        "mask_head.0.0.weight": math.sqrt(2 / (256 * 9)),
        "mask_predictor.mask_fcn_logits.weight": 0.001,
    }
    for name, std in expected.items():
        assert heads[name].std().item() == pytest.approx(std, rel=0.1), name
    assert all(not each.any() for name, each in heads.items() if name.endswith("bias"))


def test_a_region_shows_the_places_that_it_covers_to_half_a_pixel() -> None:
    """A map that holds the image's x and y, read inside a box, gives the centres of the box's bins."""
    maps = {}
    for level, stride in enumerate((4, 8)):
        y, x = torch.meshgrid(*(stride * (torch.arange(128 // stride) + 0.5) for _ in range(2)), indexing="ij")
        maps[str(level)] = torch.stack([x, y])[None].expand(2, -1, -1, -1)
    boxes = [torch.empty(0, 4), torch.tensor([[20.0, 31.0, 48.0, 66.0]])]
    (pooled,) = RoIPool(7, (4, 8))(maps, boxes, [(128, 128)] * 2)
    centres = torch.arange(7) + 0.5
    assert torch.allclose(pooled[0], (20 + 28 / 7 * centres).expand(7, 7), atol=1e-3)
    assert torch.allclose(pooled[1], (31 + 35 / 7 * centres)[:, None].expand(7, 7), atol=1e-3)


def test_a_box_of_224_pixels_is_looked_at_on_stride_16_and_others_by_their_size() -> None:
    strides = (4, 8, 16, 32)
    maps = {str(stride): torch.full((1, 1, 512 // stride, 512 // stride), float(stride)) for stride in strides}
    sizes = (10.0, 55.0, 57.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0)
    boxes = torch.tensor([[0.0, 0.0, size, size] for size in sizes])
    pooled = RoIPool(2, strides)(maps, [boxes], [(512, 512)])
    assert pooled.mean((1, 2, 3)).tolist() == [4, 4, 4, 4, 8, 8, 16, 16, 32]


def test_box_losses_are_cross_entropy_and_l1_over_all_regions() -> None:
    scores, deltas, wanted = random(5, 3), random(5, 12, seed=1), random(5, 4, seed=2)
    labels = torch.tensor([0, 2, 1, 0, 0])
    losses = box_losses(scores, deltas, labels, wanted)
    entropy = -sum(float(scores[i].log_softmax(0)[labels[i]]) for i in range(5)) / 5
    distance = sum(
        abs(float(deltas[i, 4 * int(labels[i]) + k] - wanted[i, k])) for i in range(5) if labels[i] for k in range(4)
    )
    assert float(losses["loss_classifier"]) == pytest.approx(entropy, rel=1e-5)
    assert float(losses["loss_box_reg"]) == pytest.approx(distance / 5, rel=1e-5)


def test_proposal_losses_are_divided_by_the_number_of_anchors_to_be_sampled() -> None:
    built: Any = tiny()
    network: ProposalNetwork = built.rpn
    network.fg_bg_sampler.keys = [None, None]
    objectness, deltas, wanted = random(8, 1), random(8, 4, seed=1), random(8, 4, seed=2)
    labels = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 1.0, -1.0, 0.0])  # fewer than 256, so that all are sampled
    entropy, distance = network.compute_loss(objectness, deltas, [labels[:4], labels[4:]], [wanted[:4], wanted[4:]])
    sign = {1.0: 1, 0.0: -1}
    expected = [
        math.log1p(math.exp(-sign[float(b)] * float(a))) for a, b in zip(objectness, labels, strict=True) if b >= 0
    ]
    assert float(entropy) == pytest.approx(sum(expected) / 512, rel=1e-5)
    assert float(distance) == pytest.approx(float((deltas - wanted)[[0, 5]].abs().sum()) / 512, rel=1e-5)


def test_the_mask_loss_asks_for_the_part_of_its_object_that_a_box_covers() -> None:
    mask = torch.zeros(2, 40, 40, dtype=torch.uint8)
    mask[1, :, 20:] = 1
    targets = [{"masks": mask, "labels": torch.tensor([1, 2])}]
    boxes, objects = [torch.tensor([[10.0, 0.0, 30.0, 20.0]])], [torch.tensor([1])]
    logits = torch.zeros(1, 3, 4, 4)
    logits[0, 2] = torch.tensor([-50.0, -50.0, 50.0, 50.0])  # the right half of the box
    assert float(mask_loss(logits, boxes, objects, targets)) < 1e-9
    assert float(mask_loss(-logits, boxes, objects, targets)) == pytest.approx(50)


def test_boxes_and_masks_are_resized_with_their_image_and_found_in_its_own_pixels() -> None:
    resize = Resize((64, 80), 96, 120, mean=MEAN, std=STD)
    mask = torch.zeros(1, 48, 60, dtype=torch.uint8)
    mask[0, 12:36, 15:45] = 1
    target = {"boxes": torch.tensor([[15.0, 12.0, 45.0, 36.0]]), "masks": mask, "labels": torch.tensor([1])}
    sides = set()
    for _ in range(20):
        images, targets = resize.train()([random(3, 48, 60)], [target])
        height, width = images.image_sizes[0]
        sides.add(height)
        assert images.tensors.shape[-2:] == (math.ceil(height / 32) * 32, math.ceil(width / 32) * 32)
        assert torch.allclose(
            targets[0]["boxes"], torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * torch.tensor([width, height] * 2)
        )
        assert targets[0]["masks"].float().mean() == pytest.approx(0.25, abs=0.01)
    assert sides == {64, 80}
    images, _ = resize.eval()([random(3, 48, 60)])
    assert images.image_sizes == [(96, 120)]
    found = [{"boxes": torch.tensor([[30.0, 24.0, 90.0, 72.0]])}]
    back = resize.postprocess(found, images.image_sizes, [(48, 60)])
    assert torch.allclose(back[0]["boxes"], torch.tensor([[15.0, 12.0, 45.0, 36.0]]))


def test_pixels_are_normalised_in_rgb_order_and_padding_is_the_mean() -> None:
    image = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1).expand(3, 64, 70)
    images, _ = Resize((64,), 64, 96, mean=MEAN, std=STD).eval()([image])
    assert torch.allclose(images.tensors[0, :, 10, 10], torch.tensor([2.0, 0.0, -2.0]))
    assert not images.tensors[..., 70:].any()


def test_every_loss_teaches_and_detections_lie_in_the_image() -> None:
    torch.manual_seed(0)
    objective = DetectionObjective(tiny(masks=True))  # type: ignore[arg-type]
    assert isinstance(objective.detector.roi_heads, Heads)
    boxes = torch.tensor([[5.0, 5.0, 40.0, 35.0]])
    mask = torch.ones(1, 48, 60, dtype=torch.uint8)
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": mask}
    loss, parts = objective.train()([random(3, 48, 60)], [target])
    assert set(parts) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert loss.item() == pytest.approx(sum(float(part) for part in parts.values()), rel=1e-5)
    loss.backward()
    still = [name for name, each in objective.named_parameters() if each.grad is None or not each.grad.any()]
    assert not still
    objective.detector.roi_heads.score_thresh = 0.0
    (found,) = objective.eval().detect([random(3, 48, 60)])
    assert found["masks"].shape == (len(found["boxes"]), 1, 48, 60)
    assert len(found["boxes"]) == 100
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= torch.tensor([60.0, 48.0, 60.0, 48.0]) + 1e-3).all()


def test_what_is_drawn_for_an_image_is_its_keys_and_nobody_elses() -> None:
    """Sampled anchors and regions, and the size: beside other images, in another order, after other draws."""
    labels = [(random(400, seed=seed) > 0.7).float() for seed in range(3)]
    keys = [torch.tensor([key]) for key in (5, 6, 7)]
    model = tiny()
    for sampler in (model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler):

        def sampled(order: list[int], sampler: Sampler = sampler) -> dict[int, Tensor]:
            sampler.keys = [keys[i] for i in order]
            on_object, beside = sampler([labels[i] for i in order])
            return {i: torch.stack([on_object[row], beside[row]]) for row, i in enumerate(order)}

        state = torch.get_rng_state()
        together, alone = sampled([0, 1, 2]), sampled([2]) | sampled([1, 0])
        assert all(torch.equal(together[i], alone[i]) for i in range(3))
        assert torch.equal(torch.get_rng_state(), state), "other generators stay where they are"
        sampler.keys = [torch.tensor([8])]
        assert not torch.equal(sampler([labels[0]])[1][0], together[0][1])
    resize = Resize(tuple(range(40, 72)), 64, 96, mean=MEAN, std=STD)
    image = random(3, 50, 60)
    sizes = [resize.resize(image, {"boxes": torch.zeros(1, 4), "key": key})[0].shape for key in (*keys, *keys)]
    assert sizes[:3] == sizes[3:]
    assert len(set(sizes)) > 1
