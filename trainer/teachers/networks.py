"""Which network a file's tensors are of: vision transformers and ResNets say it by their shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainer.methods.frozen import Frozen
from trainer.models.backbones import Backbone, build_backbone
from trainer.weights import WeightsError, load_strictly

STEM_WIDTH = 64
"""Of a ResNet; timm builds no other, and SwAV's RN50w2 to w5 have 128 and more."""
VIT_NAMES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}
VIT_OTHER = "vit_large_patch16_224"
"""Which of timm's names stands for a width does not matter: every dimension is given."""
HEAD_DIM = 64
"""Of attention, in all published vision transformers here; the tensors do not show it."""


def network_of(state: Mapping[str, Tensor], config: Frozen, where: str) -> nn.Module:
    """The network with these tensors, whatever the recipe says of it or their shapes show.

    raises: WeightsError if it is none that we know, or a tensor is missing, left over or of another shape
    """
    if config.name is not None:
        spec = Backbone(name=config.name, init="timm", args=config.args)
    elif "patch_embed.proj.weight" in state and "cls_token" in state:
        spec = _vit(state, config, where)
    elif "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        spec = _resnet(state, config)
    else:
        raise WeightsError(
            f"{where}: its {len(state)} tensors ({', '.join(list(state)[:3])} ...) are of no vision transformer or "
            "ResNet; name the network as timm does, teacher.name=..."
        )
    try:
        network = build_backbone(spec)
    except (ValueError, RuntimeError, AssertionError) as error:  # what timm says to dimensions that make no network
        raise WeightsError(f"{where}: no {spec.name} with {spec.args}: {error}") from error
    if config.name is None and "conv1.weight" in state:
        _set_stem(network, len(state["conv1.weight"]))
    load_strictly(network, state, f"{where}: {spec.name} {spec.args}")
    return network


def _vit(state: Mapping[str, Tensor], config: Frozen, where: str) -> Backbone:
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    embed_dim = state["patch_embed.proj.weight"].shape[0]
    positions = state["pos_embed"].shape[1] - 1 if "pos_embed" in state else -1
    side = math.isqrt(max(0, positions))
    if positions < 1 or side**2 != positions or embed_dim % HEAD_DIM:
        raise WeightsError(
            f"{where}: wanted a vision transformer with position embeddings of a square and heads of {HEAD_DIM}; this "
            f"one is {embed_dim} wide with {positions} positions; name it as timm does, teacher.name=..."
        )
    dimensions: dict[str, Any] = {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": _count(state, r"blocks\.(\d+)\."),
        "num_heads": embed_dim // HEAD_DIM,
        "dynamic_img_size": True,
    }
    if "blocks.0.ls1.gamma" in state:
        dimensions["init_values"] = 1.0  # LayerScale, as in DINOv2; the values come from the file
    name = VIT_NAMES.get(embed_dim, VIT_OTHER)
    return Backbone(name=name, init="timm", args=dimensions | config.args)


def _resnet(state: Mapping[str, Tensor], config: Frozen) -> Backbone:
    has_bottleneck = "layer1.0.conv3.weight" in state
    last, expansion = ("conv3", 4) if has_bottleneck else ("conv2", 1)
    stages = [stage for stage in (1, 2, 3, 4) if f"layer{stage}.0.{last}.weight" in state]
    channels = [len(state[f"layer{stage}.0.{last}.weight"]) // expansion for stage in stages]
    inner = len(state["layer1.0.conv1.weight"])
    dimensions: dict[str, Any] = {
        "layers": [_count(state, rf"layer{stage}\.(\d+)\.") for stage in stages],
        "channels": channels,
        "base_width": 64 * inner // channels[0] if has_bottleneck else 64,
    }
    return Backbone(name="resnet50" if has_bottleneck else "resnet18", init="timm", args=dimensions | config.args)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many blocks there are: one more than the largest number that the pattern finds."""
    return max((int(match[1]) + 1 for name in state if (match := re.match(pattern, name))), default=0)


def _set_stem(network: nn.Module, width: int) -> None:
    """Let a ResNet begin with so many channels."""
    first = network.get_submodule("layer1.0")
    if width == STEM_WIDTH:
        return
    network.add_module("conv1", nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False))
    network.add_module("bn1", nn.BatchNorm2d(width))
    for parent, name in ((first, "conv1"), (getattr(first, "downsample", None), "0")):
        if parent is not None:
            old = parent.get_submodule(name)
            assert isinstance(old, nn.Conv2d)
            new = nn.Conv2d(width, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)  # type: ignore[arg-type]
            parent.add_module(name, new)
