"""Backbones: any timm network that turns an image into one feature vector."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from trainer.models.norm import SyncBatchNorm


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone:
    """Which network, how it starts, and how its BatchNorm counts."""

    name: str
    """A timm model name, such as resnet18."""
    init: Literal["reference", "timm"] = "reference"
    """reference: the initialisation of the SSLight code (its convolutions count fan-out without groups, the last
    BatchNorm of a residual block starts at 1); timm: whatever timm does."""
    sync_batchnorm: bool = True
    """BatchNorm statistics over all ranks, so that the number of ranks does not change the training."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, such as {dynamic_img_size: true} or {drop_path_rate: 0.1}."""

    def __post_init__(self) -> None:
        if not timm.is_model(self.name):
            near = timm.list_models(f"*{self.name.split('_')[0]}*")[:5]
            raise ValueError(
                f"name must be a timm model, got {self.name!r}"
                + (f"; timm has {', '.join(near)} ..." if near else "; see timm.list_models()")
            )


def build_backbone(spec: Backbone, **overrides: Any) -> nn.Module:
    """The network without a classifier, freshly initialised from torch's global generator.

    returns: a module (B, 3, S, S) -> (B, num_features), with `num_features` as timm sets it
    raises: ValueError if timm refuses the arguments or the network yields no vector
    """
    try:
        network: nn.Module = timm.create_model(spec.name, num_classes=0, **{**spec.args, **overrides})
    except TypeError as error:
        raise ValueError(f"backbone.args: timm's {spec.name} refused {spec.args}: {error}") from error
    if spec.init == "reference":
        initialise_like_sslight(network)
    return network


@torch.no_grad()
def initialise_like_sslight(network: nn.Module) -> None:
    """Draw the weights as the published code does (SSLight backbone/{mnv2,resnet,vision_transformer}.py).

    Convolutions: normal, variance 2 / (k k C_out), depth-wise ones too. BatchNorm: 1 and 0, the last of a block
    included. Linear layers, class token and position embedding: truncated normal 0.02, as in ViTs.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        if name in ("cls_token", "pos_embed"):
            nn.init.trunc_normal_(parameter, std=0.02)


def synchronise_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm in the module count over all ranks: torch's own on a GPU, ours on a CPU."""
    if device.type == "cuda":
        synced: nn.Module = convert_sync_batchnorm(module)  # timm's: it also knows norms with a fused activation
        return synced
    return SyncBatchNorm.convert(module)


def num_features(network: nn.Module) -> int:
    """The length of the network's feature vector."""
    return int(network.num_features)  # type: ignore[arg-type]


class Branch(nn.Module):
    """A backbone and its projection head, run on views of several sizes."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, views: list[Tensor]) -> Tensor:
        """The backbone's features of every view, one pass a size: (sum of V_i * B, embed_dim).

        views: one tensor (V_i * B, 3, S_i, S_i) per size, view-major
        source: SSLight backbone/layer.py; statistics of BatchNorm are per size in the backbone, common in the head
        """
        return torch.cat([self.backbone(group) for group in views])

    def forward(self, views: list[Tensor]) -> Tensor:
        """Project every view, with one pass of the head over all of them: (sum of V_i * B, D)."""
        output: Tensor = self.head(self.features(views))
        return output
