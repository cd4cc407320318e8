"""Backbones: parameter counts of the published networks, and initialisation as published."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from trainer import weights
from trainer.methods.dino import DINOConfig
from trainer.methods.joint_embedding import ViewCounts
from trainer.methods.moco import MoCoConfig
from trainer.methods.swav import SwAVConfig
from trainer.methods.teacher import EMATeacher
from trainer.models.backbones import Backbone, Branch, build_backbone, check_sizes, num_features


def count(module: nn.Module, *, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


PUBLISHED = [
    ("mobilenetv2_100", 1280, 2_223_872, 34_164, 312),
    ("resnet18", 512, 11_176_512, 9_620, 120),
    ("resnet34", 512, 21_284_672, 17_060, 216),
    ("resnet50", 2048, 23_508_032, 53_173, 318),
    ("vit_tiny_patch16_224", 192, 5_524_416, 0, 150),
    ("vit_small_patch16_224", 384, 21_665_664, 0, 150),
]


@pytest.mark.parametrize(("name", "features", "parameters", "buffers", "entries"), PUBLISHED)
def test_backbones_have_the_published_sizes(
    name: str, features: int, parameters: int, buffers: int, entries: int
) -> None:
    network = build_backbone(Backbone(name=name))
    assert (num_features(network), count(network), len(network.state_dict())) == (features, parameters, entries)
    assert sum(buffer.numel() for buffer in network.buffers()) == buffers


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_one_network_takes_the_global_and_the_local_views(name: str) -> None:
    args = {"dynamic_img_size": True} if name.startswith("vit") else {}
    check_sizes(build_backbone(Backbone(name=name, args=args)), [224, 128, 96])


@pytest.mark.parametrize(
    ("spec", "size", "said"),
    [
        (Backbone(name="vit_tiny_patch16_224"), 128, "does not take views of 128 px .*dynamic_img_size=true"),
        (Backbone(name="vit_tiny_patch16_224", args={"dynamic_img_size": True}), 100, "100 px .*divisible by patch"),
        (Backbone(name="resnet18", args={"global_pool": ""}), 64, r"vector of 512 .*came \(2, 512, 2, 2\)"),
        (Backbone(name="resnet18", args={"features_only": True}), 64, "no feature vector; take them out"),
    ],
    ids=["one size", "no multiple", "a map", "many maps"],
)
def test_a_network_that_yields_no_vector_at_a_views_size_is_refused(spec: Backbone, size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_sizes(build_backbone(spec), [size])


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


def std_of(weight: Tensor) -> tuple[float, float]:
    """The standard deviation of drawn weights and five times the error that so many draws leave in it."""
    return weight.std().item(), 5 * weight.std().item() / math.sqrt(2 * weight.numel())


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet18", "resnet50"])
def test_every_layer_of_a_cnn_starts_as_published(name: str) -> None:
    """Convolutions count fan-out without groups: sqrt(2 / 9C) where they are depth-wise. Norms start at 1 and 0."""
    torch.manual_seed(0)
    depthwise = 0
    for module in build_backbone(Backbone(name=name)).modules():
        if isinstance(module, nn.Conv2d):
            depthwise += module.groups > 1
            std, error = std_of(module.weight)
            assert abs(std - math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))) < error
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
    assert depthwise == (17 if name == "mobilenetv2_100" else 0)


def test_every_layer_of_a_vit_starts_as_published() -> None:
    """Everything truncated normal 0.02, but the patch embedding, which the published code leaves to torch."""
    torch.manual_seed(0)
    network = build_backbone(Backbone(name="vit_tiny_patch16_224"))
    state = network.state_dict()
    drawn = [key for key, value in state.items() if value.ndim > 1 and key != "patch_embed.proj.weight"]
    assert len(drawn) == 50
    for key in drawn:
        std, error = std_of(state[key])
        assert abs(std - 0.02) < error, key
    for key, value in state.items():
        if "norm" in key or (key.endswith("bias") and "patch_embed" not in key):
            assert bool((value == (1 if key.endswith("weight") else 0)).all()), key
    fan_in = 3 * 16 * 16
    for key in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert state[key].abs().max().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.05)
    assert std_of(state["patch_embed.proj.weight"])[0] == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)


def test_timm_starts_elsewhere_so_the_reference_initialisation_is_needed() -> None:
    torch.manual_seed(0)
    norms = [
        m for m in build_backbone(Backbone(name="resnet18", init="timm")).modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert any(bool((norm.weight == 0).all()) for norm in norms)
    mobile = build_backbone(Backbone(name="mobilenetv2_100", init="timm"))
    assert mobile.get_parameter("blocks.5.0.conv_dw.weight").std().item() == pytest.approx(0.47, abs=0.02)
    assert build_backbone(Backbone(name="vit_tiny_patch16_224", init="timm")).get_parameter("cls_token").std() < 1e-5


def test_drop_path_rises_along_the_student_and_the_teacher_has_none() -> None:
    backbone = build_backbone(
        Backbone(name="vit_tiny_patch16_224", args={"dynamic_img_size": True, "drop_path_rate": 0.1})
    )
    teacher = EMATeacher(Branch(backbone, nn.Identity()))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert not [m for m in teacher.modules() if isinstance(m, DropPath) and m.drop_prob]
    images = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert teacher.training
    assert torch.equal(teacher([images]), teacher([images]))
    assert not torch.equal(backbone(images), backbone(images)), "the student does drop paths"


def test_an_unknown_network_is_refused_with_near_names() -> None:
    with pytest.raises(ValueError, match="timm model, got 'resnet19'"):
        Backbone(name="resnet19")


def test_arguments_that_timm_refuses_are_named() -> None:
    with pytest.raises(ValueError, match=r"backbone\.args"):
        build_backbone(Backbone(name="resnet18", args={"no_such_argument": 1}))


@pytest.mark.parametrize(
    ("name", "said"), [("resnet18", "would count every batch twice"), ("vgg11", "does not offer it")]
)
def test_activations_are_not_computed_again_where_that_would_change_the_training(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_backbone(Backbone(name=name, activation_checkpointing=True))


SMALL = Backbone(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]})


def test_a_cifar_stem_keeps_small_images_at_their_size() -> None:
    network = build_backbone(Backbone(name="resnet18", stem="cifar"))
    assert count(network) == 11_168_832
    assert network.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)  # type: ignore[operator]
    std = network.conv1.weight.detach().std()  # type: ignore[union-attr]
    assert float(std) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.1), "drawn as all convolutions"


@pytest.mark.parametrize("init", ["reference", "timm"])
def test_a_thin_network_is_thin_inside_its_blocks_only_and_drawn_for_its_width(init: str) -> None:
    spec = replace(SMALL, init=init, inner_width=0.25)  # type: ignore[arg-type]
    network = build_backbone(spec)
    block = network.layer4[0]  # type: ignore[index, union-attr]
    assert (block.conv1.out_channels, block.bn1.num_features, block.conv2.in_channels) == (4, 4, 4)
    assert (block.conv1.in_channels, block.conv2.out_channels, num_features(network)) == (16, 16, 16)
    if init == "reference":
        widest = build_backbone(replace(spec, inner_width=1 / 8, args={"layers": [1] * 4, "channels": [64] * 4}))
        std = widest.layer4[0].conv1.weight.detach().std()  # type: ignore[index, union-attr]
        assert float(std) == pytest.approx(math.sqrt(2 / (9 * 8)), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "mobilenetv2_100", "stem": "cifar"}, "mobilenetv2_100 has no such stem; set it to timm"),
        ({"name": "resnet18d", "stem": "cifar"}, "resnet18d has no such stem"),
        ({"name": "vit_tiny_patch16_224", "inner_width": 0.5}, "inner_width: the network has no block that gates fit"),
        ({"name": "resnext50_32x4d", "inner_width": 0.5}, "inner_width: block layer1.0 has grouped convolutions"),
    ],
)
def test_networks_without_such_a_stem_or_such_blocks_are_refused(changes: dict[str, str], said: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        build_backbone(replace(SMALL, args={}, **changes))  # type: ignore[arg-type]


def test_a_stem_and_a_width_come_back_with_the_weights(tmp_path: Path) -> None:
    spec = replace(SMALL, stem="cifar", inner_width=0.5)
    network = build_backbone(spec).eval()
    weights.save_backbone(tmp_path, network, spec, size=32, mean=[0.5] * 3, std=[0.25] * 3)
    again, _ = weights.load_backbone(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), network(images))
