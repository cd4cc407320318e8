"""Backbones: any timm network that turns an image into one feature vector."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
from timm.layers import DropPath, PatchEmbed, convert_sync_batchnorm
from torch import Tensor, nn

from trainer.models.gated_blocks import KINDS
from trainer.models.gates import Gates
from trainer.models.gating import add_gates, gateable_blocks
from trainer.models.norm import SyncBatchNorm
from trainer.models.positions import resample_as_published
from trainer.models.slicing import first_channels, narrow


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone:
    """Which network, how it starts, and how its BatchNorm counts."""

    name: str
    """A timm model name, such as resnet18."""
    init: Literal["reference", "timm"] = "reference"
    """reference: the initialisation of the SSLight code (its convolutions count fan-out without groups, the last
    BatchNorm of a residual block starts at 1); timm: whatever timm does."""
    pos_embed: Literal["reference", "timm"] = "reference"
    """How a vision transformer fits its position embeddings to other view sizes: reference: bicubic with the scale
    factors of the SSLight and DINO code; timm: bicubic to the exact size, with antialiasing. Networks without position
    embeddings have nothing to fit."""
    sync_batchnorm: bool = True
    """BatchNorm statistics over all ranks, so that the number of ranks does not change the training."""
    activation_checkpointing: bool = False
    """Keep few activations and compute the others again in the backward pass: less memory, more time.
    For networks without BatchNorm, which would count every batch twice."""
    stem: Literal["timm", "cifar"] = "timm"
    """timm: the network's own; cifar: a 3 x 3 convolution of stride 1, and no pooling behind it, so that images of
    32 px keep their size; for timm's ResNets. source: SimCLR, arXiv 2002.05709, appendix B.9"""
    inner_width: float = 1.0
    """Share of the channels inside of each block, those that gates can close, that the network has at all: a network
    that is thin from the start, where the gated one was gated. What runs between blocks stays as wide as it was."""
    gates: Gates | None = None
    """Channel gates, for networks of ResNet's and MobileNetV2's blocks; null for a network that is dense only."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, such as {dynamic_img_size: true} or {drop_path_rate: 0.1}."""

    def __post_init__(self) -> None:
        if not timm.is_model(self.name):
            near = timm.list_models(f"*{self.name.split('_')[0]}*")[:5]
            raise ValueError(
                f"name must be a timm model, got {self.name!r}"
                + (f"; timm has {', '.join(near)} ..." if near else "; see timm.list_models()")
            )
        if not 0 < self.inner_width <= 1:
            raise ValueError(f"inner_width must lie in (0, 1], got {self.inner_width}; 1 leaves the network as it is")


def build_backbone(spec: Backbone, **overrides: Any) -> nn.Module:
    """The network without a classifier, freshly initialised from torch's global generator.

    returns: a module (B, 3, S, S) -> (B, num_features), with `num_features` as timm sets it
    raises: ValueError if timm refuses the arguments or the network yields no vector
    """
    try:
        network: nn.Module = timm.create_model(spec.name, num_classes=0, **{**spec.args, **overrides})
    except TypeError as error:
        raise ValueError(f"backbone.args: timm's {spec.name} refused {spec.args}: {error}") from error
    if not hasattr(network, "num_features"):
        raise ValueError(f"backbone.args: {spec.args} leave timm's {spec.name} no feature vector; take them out")
    if spec.stem == "cifar":
        _give_cifar_stem(network, spec.name)
    if spec.inner_width < 1:
        narrow(network, first_channels(network, _thin_widths(network, spec.inner_width)))
    if spec.init == "reference":
        initialise_like_sslight(network)  # behind the two above: it draws for the widths that it finds
    if spec.pos_embed == "reference":
        resample_as_published(network)
    if spec.gates is not None:
        add_gates(network, spec.gates)
    if spec.activation_checkpointing:
        _checkpoint_activations(network, spec.name)
    return network


def _give_cifar_stem(network: nn.Module, name: str) -> None:
    stem, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
    if not isinstance(stem, nn.Conv2d) or not isinstance(pool, nn.MaxPool2d):
        raise ValueError(
            f"backbone.stem cifar replaces a ResNet's one convolution and the pooling behind it, and {name} has no "
            "such stem; set it to timm"
        )
    network.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm draws the others
    network.maxpool = nn.Identity()


def _thin_widths(network: nn.Module, share: float) -> dict[str, int]:
    """So many channels for each layer that a gate would choose among, at least one."""
    return {
        f"{name}.{layer}": max(1, round(share * getattr(block, layer).out_channels))
        for name, block in gateable_blocks(network, key="inner_width")
        for layer in KINDS[type(block)].gated_layers
    }


def _checkpoint_activations(network: nn.Module, name: str) -> None:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise ValueError(
            f"backbone.activation_checkpointing runs layers twice, and the BatchNorm of {name} would count every batch "
            "twice; set it to false, or choose a network without BatchNorm, such as a vision transformer"
        )
    try:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:  # timm's networks that cannot do it lack it, or assert
        raise ValueError(
            f"backbone.activation_checkpointing: timm's {name} does not offer it: set it to false"
        ) from error


@torch.no_grad()
def check_sizes(network: nn.Module, sizes: Iterable[int], *, block: str = "backbone") -> None:
    """Run two blank images of each size through the network, so that what does not fit is said before training.

    block: of the recipe, for the message
    raises: ValueError if it does not take a size, or yields something else than one feature vector an image
    """
    was_training = network.training
    for size in sorted(set(sizes)):
        try:
            features = network.eval()(torch.zeros(2, 3, size, size))
        except Exception as error:  # whatever a network says that it was not made for
            raise ValueError(
                f"{block}: the network does not take views of {size} px ({' '.join(str(error).split())}); give views "
                "of a size that it takes, or let it take several: vision transformers of timm do with "
                f"{block}.args.dynamic_img_size=true, at multiples of their patch size"
            ) from error
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        if shape != (2, num_features(network)):
            raise ValueError(
                f"{block}: wanted one vector of {num_features(network)} features an image, and for 2 images of "
                f"{size} px came {shape}; leave global_pool out of {block}.args, or choose another network"
            )
    network.train(was_training)


@torch.no_grad()
def initialise_like_sslight(network: nn.Module) -> None:
    """Draw the weights as the published code does (SSLight backbone/{mnv2,resnet,vision_transformer}.py).

    Convolutions: normal, variance 2 / (k k C_out), depth-wise ones too; a ViT's patch embedding as torch draws it.
    BatchNorm: 1 and 0, the last of a block included. Linear layers, class token and position embedding: truncated
    normal 0.02, as in ViTs.
    """
    patches = {module.proj for module in network.modules() if isinstance(module, PatchEmbed)}
    for module in network.modules():
        if module in patches:
            module.reset_parameters()  # type: ignore[operator]
        elif isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Conv2d | nn.Linear) and module not in patches and module.bias is not None:
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


def stop_stochastic_depth(module: nn.Module) -> None:
    """Drop no path any more, in training mode either."""
    for inner in module.modules():
        if isinstance(inner, DropPath):
            inner.drop_prob = 0.0


def num_features(network: nn.Module) -> int:
    """The length of the network's feature vector; some, such as MobileNetV3, widen it once more behind the pooling."""
    return int(getattr(network, "head_hidden_size", network.num_features))  # type: ignore[arg-type]


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
