"""Checkpoints in the published layouts, made from networks written down here, and what these networks answer."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.resnet import Bottleneck, ResNet

from tests.teachers.runs import stir

K, D = 12, 8
"""Prototypes, and the numbers of an embedding."""


@dataclass
class Case:
    """A file's content and the answer of the network that it was made from."""

    tree: Any
    answer: Callable[[Tensor], Tensor]
    """(B, 3, 32, 32) -> (B, K) scores."""


class Small(ResNet):
    """SwAV's ResNet-50 with its stem as wide as its first stage (RN50w2 and on), a block a stage."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(Bottleneck, [1, 1, 1, 1])
        self.inplanes, self.fc = width, nn.Identity()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        for stage in range(4):
            layer = self._make_layer(Bottleneck, width * 2**stage, 1, stride=2 if stage else 1)
            self.add_module(f"layer{stage + 1}", layer)


def vit(patch_size: int = 8) -> nn.Module:
    return ready(VisionTransformer(32, patch_size, embed_dim=64, depth=2, num_heads=1, num_classes=0))


def ready(module: nn.Module) -> Any:
    stir(module)
    return module.eval()


def dino_mlp(embed_dim: int, *, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in ((embed_dim, 24), (24, 24)):
        layers += [nn.Linear(wide, narrow), *([nn.BatchNorm1d(narrow)] if norm else []), nn.GELU()]
    return ready(nn.Sequential(*layers, nn.Linear(24, D)))


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def last_layer(*, old: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """A weight-normed layer whose gain is not 1, under the new names or the old."""
    layer = ready(weight_norm(nn.Linear(D, K, bias=False)))
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    return layer, {names[name] if old else name: value for name, value in layer.state_dict().items()}


def dino(backbone: nn.Module, embed_dim: int, *, norm: bool = False, old: bool = True) -> Case:
    mlp = dino_mlp(embed_dim, norm=norm)
    last, last_state = last_layer(old=old)
    branch = prefixed("backbone.", backbone.state_dict()) | prefixed("head.mlp.", mlp.state_dict())
    branch |= prefixed("head.last_layer.", last_state)
    other = {name: torch.zeros_like(value) for name, value in prefixed("module.", branch).items()}
    tree = {
        "student": other, "teacher": branch, "optimizer": {"state": {}}, "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4), "dino_loss": {"center": torch.zeros(1, K)},
    }  # fmt: skip
    return Case(tree, lambda images: last(F.normalize(mlp(backbone(images)), dim=-1)))


def dino_vit() -> Case:
    return dino(vit(), 64)


def dino_student_prefix() -> Case:
    """A teacher that was saved out of DistributedDataParallel."""
    case = dino(vit(), 64, old=False)
    case.tree["teacher"] = prefixed("module.", case.tree["teacher"])
    return case


def dino_resnet() -> Case:
    return dino(ready(Small()), 1024, norm=True)


def dino_first_uploads() -> Case:
    case = dino_vit()
    state = {name.removeprefix("backbone.").removeprefix("head."): v for name, v in case.tree["teacher"].items()}
    names = {"mlp.": "projection_head.", "last_layer.": "prototypes."}
    for new, old in names.items():
        state = {old + name.removeprefix(new) if name.startswith(new) else name: v for name, v in state.items()}
    case.tree["teacher"] = state
    return case


def ibot() -> Case:
    case = dino_vit()
    teacher = case.tree["teacher"]
    aliases = {name.replace("last_layer.", "last_layer2."): v for name, v in teacher.items() if "last_layer." in name}
    teacher |= aliases
    case.tree["ibot_loss"] = case.tree.pop("dino_loss") | {"center2": torch.zeros(1, 1, K)}
    case.tree["student"]["module.backbone.masked_embed"] = torch.zeros(1, 64)
    return case


class MSNHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(64, 24), nn.BatchNorm1d(24)
        self.fc2, self.bn2 = nn.Linear(24, 24), nn.BatchNorm1d(24)
        self.fc3 = nn.Linear(24, D)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(self.fc1(x)))
        return self.fc3(F.gelu(self.bn2(self.fc2(x))))


def msn() -> Case:
    backbone, head, prototypes = vit(patch_size=4), ready(MSNHead()), 3 * torch.randn(K, D)
    state = backbone.state_dict() | prefixed("fc.", head.state_dict())
    tree = {"target_encoder": prefixed("module.", state), "prototypes": prototypes}
    units = F.normalize(prototypes, dim=1)
    return Case(tree, lambda images: F.normalize(head(backbone(images)), dim=-1) @ units.T)


def swav(width: int = 32) -> Case:
    backbone = ready(Small(width))
    head = ready(nn.Sequential(nn.Linear(32 * width, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, D)))
    prototypes = F.normalize(torch.randn(K, D), dim=1)
    state = backbone.state_dict() | prefixed("projection_head.", head.state_dict())
    tree = prefixed("module.", state | {"prototypes.weight": prototypes})
    return Case(tree, lambda images: F.normalize(head(backbone(images)), dim=-1) @ prototypes.T)


def swav_under_state_dict() -> Case:
    case = swav(64)
    return Case({"epoch": 3, "arch": "resnet50", "state_dict": case.tree}, case.answer)


def swav_one_layer() -> Case:
    backbone, head = ready(Small()), ready(nn.Linear(1024, D))
    prototypes = F.normalize(torch.randn(K, D), dim=1)
    state = backbone.state_dict() | prefixed("projection_head.", head.state_dict()) | {"prototypes.weight": prototypes}
    return Case(state, lambda images: F.normalize(head(backbone(images)), dim=-1) @ prototypes.T)


def deepcluster() -> Case:
    case = swav()
    first = case.tree.pop("module.prototypes.weight")
    for number, weight in enumerate((first, first + 1, first + 2)):
        case.tree[f"module.prototypes.prototypes{number}.weight"] = weight
    return case


RIGHT = (
    dino_vit, dino_student_prefix, dino_resnet, dino_first_uploads, ibot, msn, swav, swav_under_state_dict,
    swav_one_layer, deepcluster,
)  # fmt: skip
