"""Backbones: parameter counts of the published networks, and initialisation as published."""

import math

import pytest
import timm
import torch
from torch import nn

from trainer.methods.dino import DINOConfig
from trainer.methods.joint_embedding import ViewCounts
from trainer.methods.moco import MoCoConfig
from trainer.methods.swav import SwAVConfig
from trainer.models.backbones import Backbone, build_backbone, num_features


def count(module: nn.Module, *, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


@pytest.mark.parametrize(
    ("name", "features", "parameters"),
    [("resnet18", 512, 11_176_512), ("mobilenetv2_100", 1280, 2_223_872), ("vit_tiny_patch16_224", 192, 5_524_416)],
)
def test_backbones_have_the_published_sizes(name: str, features: int, parameters: int) -> None:
    network = build_backbone(Backbone(name=name))
    assert (num_features(network), count(network)) == (features, parameters)


def test_heads_have_the_published_sizes() -> None:
    backbone = build_backbone(Backbone(name="resnet18"))
    dino = DINOConfig(
        name="dino", num_prototypes=4096, head_norm=True, warmup_teacher_temp_epochs=50, global_weight=0.4,
        local_weight=0.6,
    ).build(backbone, ViewCounts(2, 6))  # fmt: skip
    # 18,517,800 trained with SSLight's joint probe of 513,000, which is not part of this network
    assert count(dino.student.head) == 6_832_384
    assert count(dino, trained_only=True) == 18_517_800 - 513_000
    mobile = build_backbone(Backbone(name="mobilenetv2_100"))
    moco = MoCoConfig(name="moco", queue_size=8, global_weight=0.4, local_weight=0.6).build(mobile, ViewCounts(2, 6))
    assert count(moco.student.head) == 2_885_760
    swav = SwAVConfig(name="swav", num_prototypes=3000, queue_size=8, global_weight=0.4, local_weight=0.6)
    built = swav.build(mobile, ViewCounts(2, 6))
    assert (count(built.student.head), count(built.prototypes)) == (5_779_584, 384_000)


def test_reference_initialisation_differs_from_timms_where_the_published_code_does() -> None:
    torch.manual_seed(0)
    network = build_backbone(Backbone(name="mobilenetv2_100"))
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 300:
            expected = math.sqrt(2 / (9 * module.in_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
    resnet = build_backbone(Backbone(name="resnet18"))
    assert all(bool((module.weight == 1).all()) for module in resnet.modules() if isinstance(module, nn.BatchNorm2d))
    assert any(
        bool((module.weight == 0).all())
        for module in timm.create_model("resnet18").modules()
        if isinstance(module, nn.BatchNorm2d)
    ), "timm starts the last norm of a block at 0: the difference is real"


def test_an_unknown_network_is_refused_with_near_names() -> None:
    with pytest.raises(ValueError, match="timm model, got 'resnet19'"):
        Backbone(name="resnet19")


def test_arguments_that_timm_refuses_are_named() -> None:
    with pytest.raises(ValueError, match=r"backbone\.args"):
        build_backbone(Backbone(name="resnet18", args={"no_such_argument": 1}))
