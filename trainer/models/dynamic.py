"""A gated network that computes, for one image at a time, only the channels that its gates open for it."""

import copy

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from trainer.models.gated_blocks import GatedBasicBlock, GatedBlock, GatedBottleneck, GatedInvertedResidual, ModeNorm
from trainer.models.gating import always_hard, gating_of

LAYERS: dict[type[GatedBlock], tuple[tuple[str, str, str | None], ...]] = {
    GatedBasicBlock: (("conv1", "bn1", "act1"), ("conv2", "bn2", None)),
    GatedBottleneck: (("conv1", "bn1", "act1"), ("conv2", "bn2", "act2"), ("conv3", "bn3", None)),
    GatedInvertedResidual: (("conv_pw", "bn1", None), ("conv_dw", "bn2", None), ("conv_pwl", "bn3", None)),
}
"""A block's convolutions, the norm behind each, and the activation, where the norm does not hold it itself."""


class OpenConvolution(nn.Module):
    """A convolution with its norm folded in, of which a pass computes some channels, and from some."""

    def __init__(self, conv: nn.Module, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        if type(conv) is not nn.Conv2d or not isinstance(norm, _BatchNorm):
            raise ValueError(f"wanted a plain convolution and its BatchNorm, got {conv} and {norm}; use masks instead")
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.weight, self.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.depth_wise = conv.groups > 1
        self.activation = activation

    def forward(self, x: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
        """(1, C_open, H, W) -> (1, C_open', H', W'), with the numbers of the open channels; None for all."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if outputs is not None:
            weight, bias = weight[outputs], bias[outputs]
        if inputs is not None and not self.depth_wise:
            weight = weight[:, inputs]
        groups = len(weight) if self.depth_wise else 1
        output: Tensor = self.activation(F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups))
        return output


class DynamicBlock(nn.Module):
    """A gated block in eval mode that leaves closed channels out, where hard gates multiply them by 0."""

    def __init__(self, block: GatedBlock) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer(block, *names) for names in LAYERS[type(block)])
        self.passed = tuple(block.convolutions.values())
        self.gates, self.has_skip = block.gates, block.has_skip
        self.downsample = block._modules.get("downsample")
        self.last_activation = block._modules.get("act3", block._modules.get("act2"))

    def forward(self, x: Tensor) -> Tensor:
        """(1, C_in, H, W) -> (1, C_out, H', W'). raises: ValueError for a batch of another size"""
        if len(x) != 1:
            raise ValueError(
                f"dynamic execution computes other channels for every image, so it takes one at a time, got {len(x)}; "
                "run the gated network itself, or a sliced one, on batches"
            )
        numbers = [gate(x)[0].nonzero()[:, 0] for gate in self.gates]
        inner = x
        for layer, (of_input, of_output) in zip(self.layers, self.passed, strict=True):
            inputs, outputs = (None if gate is None else numbers[gate] for gate in (of_input, of_output))
            inner = layer(inner, inputs, outputs)
        if self.has_skip:
            inner = inner + (x if self.downsample is None else self.downsample(x))
        return inner if self.last_activation is None else self.last_activation(inner)


def _layer(block: GatedBlock, conv: str, norm: str, activation: str | None) -> OpenConvolution:
    behind = block.get_submodule(norm)
    behind = behind.gated_norm if isinstance(behind, ModeNorm) else behind
    act = getattr(behind, "act", nn.Identity()) if activation is None else block.get_submodule(activation)
    return OpenConvolution(block.get_submodule(conv), behind, act)


def dynamic_network(gated: nn.Module) -> nn.Module:
    """A copy of a gated network for single images in eval mode: (1, 3, S, S) -> (1, num_features), as with hard gates.

    raises: ValueError if it has no gates, or convolutions that are not plain ones
    """
    gating_of(gated)
    network = copy.deepcopy(gated).eval().requires_grad_(False)
    always_hard(network)
    for name, block in list(network.named_modules()):
        if isinstance(block, GatedBlock):
            network.set_submodule(name, DynamicBlock(block).eval())
    return network
