"""timm's residual blocks with channel gates, and BatchNorm that knows two modes."""

import copy
from typing import ClassVar

from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.models.gates import Gate, Gates, Switch


class ModeNorm(nn.Module):
    """Two BatchNorms, weights and statistics: one of the dense network, one of all gated modes.

    A channel behind closed gates has another mean and variance, and running statistics of both would fit neither.
    """

    def __init__(self, norm: _BatchNorm, switch: Switch) -> None:
        super().__init__()
        self.dense_norm, self.gated_norm, self.switch = norm, copy.deepcopy(norm), switch

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the mode's own BatchNorm."""
        output: Tensor = self.dense_norm(x) if self.switch.mode == "dense" else self.gated_norm(x)
        return output


def keep_open(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, C, H, W) without the closed channels; behind norm and activation this is as if they did not exist."""
    return x if mask is None else x * mask.to(x.dtype)[:, :, None, None]


class GatedBlock(nn.Module):
    """A timm block with gates: its layers under its own names, so that its weights stay what timm loads."""

    convolutions: ClassVar[dict[str, tuple[int | None, int | None]]]
    """Which of the block's gates the input and the output channels of each convolution pass."""
    norms: ClassVar[dict[str, int]]
    """The gate that each norm's channels meet, but for those whose channels none does."""
    gated_layers: ClassVar[tuple[str, ...]]
    """The convolution whose outputs each gate opens."""

    def __init__(self, block: nn.Module, name: str, settings: Gates, switch: Switch) -> None:
        super().__init__()
        for child_name, child in block.named_children():
            self.add_module(child_name, child)
        in_channels = getattr(block, next(iter(self.convolutions))).in_channels
        widths = [getattr(block, layer).out_channels for layer in self.gated_layers]
        self.gates = nn.ModuleList(
            Gate(f"{name}.{layer}", in_channels, width, settings, switch)
            for layer, width in zip(self.gated_layers, widths, strict=True)
        )
        self.has_skip = getattr(block, "has_skip", True)

    def add_shortcut(self, residual: Tensor, x: Tensor) -> Tensor:
        """The sum behind a residual block, with whatever the block does to either side."""
        drop_path, downsample = self._modules.get("drop_path"), self._modules.get("downsample")
        residual = residual if drop_path is None else drop_path(residual)
        return residual + (x if downsample is None else downsample(x))


class GatedBasicBlock(GatedBlock):
    """ResNet-18's and 34's block; its gate closes channels between the two convolutions."""

    convolutions: ClassVar = {"conv1": (None, 0), "conv2": (0, None)}
    norms: ClassVar = {"bn1": 0}
    gated_layers: ClassVar = ("conv1",)
    conv1: nn.Module
    conv2: nn.Module
    bn1: nn.Module
    bn2: nn.Module
    act1: nn.Module
    act2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """As timm's, with the mask behind the first activation."""
        (gate,) = self.gates
        inner = keep_open(self.act1(self.bn1(self.conv1(x))), gate(x))
        output: Tensor = self.act2(self.add_shortcut(self.bn2(self.conv2(inner)), x))
        return output


class GatedBottleneck(GatedBlock):
    """ResNet-50's block, with a gate before and one behind its 3 x 3 convolution."""

    convolutions: ClassVar = {"conv1": (None, 0), "conv2": (0, 1), "conv3": (1, None)}
    norms: ClassVar = {"bn1": 0, "bn2": 1}
    gated_layers: ClassVar = ("conv1", "conv2")
    conv1: nn.Module
    conv2: nn.Module
    conv3: nn.Module
    bn1: nn.Module
    bn2: nn.Module
    bn3: nn.Module
    act1: nn.Module
    act2: nn.Module
    act3: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """As timm's, with masks behind the first two activations."""
        first, second = self.gates
        inner = keep_open(self.act1(self.bn1(self.conv1(x))), first(x))
        inner = keep_open(self.act2(self.bn2(self.conv2(inner))), second(x))
        output: Tensor = self.act3(self.add_shortcut(self.bn3(self.conv3(inner)), x))
        return output


class GatedInvertedResidual(GatedBlock):
    """MobileNetV2's block; its gate closes expanded channels.

    The mask follows the depth-wise norm, from which a channel closed earlier would come as the activation of its bias.
    """

    convolutions: ClassVar = {"conv_pw": (None, 0), "conv_dw": (0, 0), "conv_pwl": (0, None)}
    norms: ClassVar = {"bn1": 0, "bn2": 0}
    gated_layers: ClassVar = ("conv_pw",)
    conv_pw: nn.Module
    conv_dw: nn.Module
    conv_pwl: nn.Module
    bn1: nn.Module
    bn2: nn.Module
    bn3: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """As timm's, with the mask behind the depth-wise convolution."""
        (gate,) = self.gates
        inner = keep_open(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x)))), gate(x))
        output: Tensor = self.bn3(self.conv_pwl(inner))
        return self.add_shortcut(output, x) if self.has_skip else output


KINDS: dict[type[nn.Module], type[GatedBlock]] = {
    BasicBlock: GatedBasicBlock,
    Bottleneck: GatedBottleneck,
    InvertedResidual: GatedInvertedResidual,
}
