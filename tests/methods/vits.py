"""Tiny vision transformers and their views, for methods that look at patches."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.methods.ibot import IBOT, IBOTConfig
from trainer.methods.joint_embedding import ViewCounts
from trainer.methods.msn import MSN, MSNConfig
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.heads import PlainMLP
from trainer.schedules import Progress

COUNTS = ViewCounts(global_views=2, local_views=2)
ARGS = {"img_size": 32, "patch_size": 8, "dynamic_img_size": True, "embed_dim": 24, "depth": 2, "num_heads": 2}
LINEAR = PlainMLP(hidden_dim=16, norm=False, activation="none")
IDS = [7, 3, 11, 5]


def vit(**more: Any) -> nn.Module:
    """16 patches of a 32 px view, 4 of a 16 px one."""
    torch.manual_seed(0)
    pos_embed: Any = more.pop("pos_embed", "reference")
    return build_backbone(Backbone(name="vit_tiny_patch16_224", pos_embed=pos_embed, args=ARGS | more))


def views(batch: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 * batch, 3, size, size, generator=generator) for size in (32, 16)]


def progress(epoch: int = 1, step: int = 3, seed: int = 0) -> Progress:
    return Progress(step=step, epoch=epoch, lr=0.1, weight_decay=0.0, momentum=0.9, seed=seed)


IBOT_CONFIG = IBOTConfig(
    name="ibot", hidden_dim=32, bottleneck_dim=8, num_prototypes=12, head_norm=False, warmup_teacher_temp_epochs=3,
    global_weight=0.4, local_weight=0.6,
)  # fmt: skip
MSN_CONFIG = MSNConfig(
    name="msn", hidden_dim=32, out_dim=8, num_prototypes=12, head_norm=False, global_weight=0.4, local_weight=0.6
)


def ibot(**more: Any) -> IBOT:
    network = vit()
    return replace(IBOT_CONFIG, **more).build(network, COUNTS)


def msn(**more: Any) -> MSN:
    network = vit()
    return replace(MSN_CONFIG, **more).build(network, COUNTS)
