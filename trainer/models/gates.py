"""Channel gates: for each image, which of a block's inner channels are computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Mode = Literal["dense", "sampled", "hard", "static"]
"""dense: no gate is asked; sampled: open with probability sigmoid(logit); hard: where the logit is at least 0;
static: the same channels for every image."""
Masks = Mapping[str, Tensor]
"""For each gate, by its name in the network, the (C,) channels that are open: 0 or 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    """Channel gates of a backbone."""

    hidden_dim: int | None = None
    """Of each gate's MLP; null for a quarter of the block's input channels, as published, but at least 8."""
    tau: float = 2 / 3
    """Temperature of the soft gate, of which only the gradient knows."""
    initial_bias: float = 1.5
    """Of the logits: 0 opens half of the channels at first, as published; 1.5 opens 82 % and starts nearly dense."""
    target: float
    """Multiply-accumulates of the gated network, its gates included, as a share of the dense network's."""
    pairs: Literal["cross", "cross_symmetric", "full"] = "cross"
    """What two views A and B are compared as: cross: A gated with B dense, the published pair, two passes;
    cross_symmetric: B gated with A dense, too; full: also dense with dense and gated with gated; four passes. Where
    targets are dense anyway (MoCo, DINO, SwAV), which views pass gated: `groups_for` in trainer/methods/passes.py."""
    penalty: Literal["lagrangian", "published"] = "lagrangian"
    """lagrangian: an augmented one, whose multiplier grows until hard gates meet the target; published: strength x
    (ratio - target)^2 of sampled gates, which misses it by points."""
    strength: float = 100.0
    """lambda, of the quadratic term; published with 5."""
    multiplier_lr: float = 2.0
    """How far a step moves the Lagrangian's multiplier, for a ratio that is off by 1."""
    anneal: float = 0.25
    """The target falls from 1 in a straight line over this share of the run; 0 asks for all of it at once."""
    lr_scale: float = 10.0
    """The gates' learning rate over that of all other weights; at 1, as published, Adam moves them too slowly for short
    runs."""
    bound_weight: float = 1.0
    """gamma, of the term that keeps every gate's share of open channels in an interval that widens."""
    settle_images: int = 2048
    """Train images, read as k-NN reads them, on which the finished network's gates are shifted to meet the target; 0 to
    leave them as they were trained, as published."""

    def __post_init__(self) -> None:
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {self.hidden_dim}; null for a quarter of the input")
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, got {self.tau}")
        if not self.lr_scale > 0:
            raise ValueError(f"lr_scale must be above 0, got {self.lr_scale}")
        if not 0 < self.target < 1:
            raise ValueError(f"target must lie in (0, 1), got {self.target}")
        if self.settle_images < 0:
            raise ValueError(f"settle_images must be at least 0, got {self.settle_images}")
        if not 0 <= self.anneal < 1:
            raise ValueError(f"anneal must lie in [0, 1), got {self.anneal}")
        for field in ("strength", "multiplier_lr", "bound_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")


class Opening(NamedTuple):
    """What a gate did in a pass; the forward values are 0 and 1, gradients are those of the soft gate."""

    mask: Tensor
    """(B, C) as it was applied."""
    hard: Tensor
    """(B, C) as it would be without noise, with the gradient of the gate that was sampled."""


class Switch:
    """What all gates and norms of one network share: the mode they run in, and where openings are written down."""

    def __init__(self) -> None:
        self.mode: Mode = "dense"
        self.masks: Masks = {}
        self.openings: list[Opening] | None = None


class Gate(nn.Module):
    """Global pooling and a small MLP that say, from a block's input, which of its inner channels to compute.

    source: arXiv 2301.09164 and DGNet (ICCV 2021); the bias, float32 noise, and the channel that always stays are ours
    """

    def __init__(self, name: str, in_channels: int, num_channels: int, settings: Gates, switch: Switch) -> None:
        super().__init__()
        self.name, self.num_channels, self.tau, self.switch = name, num_channels, settings.tau, switch
        hidden_dim = settings.hidden_dim or max(in_channels // 4, 8)
        self.squeeze = nn.Linear(in_channels, hidden_dim, bias=False)
        self.norm = nn.BatchNorm1d(hidden_dim)
        self.expand = nn.Linear(hidden_dim, num_channels)
        for linear in (self.squeeze, self.expand):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        nn.init.constant_(self.expand.bias, settings.initial_bias)

    @property
    def macs(self) -> int:
        """Of its own layers, an image."""
        return self.squeeze.weight.numel() + self.expand.weight.numel()

    def forward(self, x: Tensor) -> Tensor | None:
        """(B, C_in, H, W) a block's input -> (B, C) open channels, (1, C) static ones, None for all of them."""
        if self.switch.mode == "dense":
            return None
        if self.switch.mode == "static":
            return self.switch.masks[self.name].to(x)[None]
        with torch.autocast(x.device.type, enabled=False):
            logits = self.expand(F.relu(self.norm(self.squeeze(x.float().mean((2, 3))))))
            noise = logistic_noise(torch.rand_like(logits)) if self.switch.mode == "sampled" else None
            opening = opened(logits, noise, self.tau)
        if self.switch.openings is not None:
            self.switch.openings.append(opening)
        return opening.mask


def logistic_noise(uniform: Tensor) -> Tensor:
    """The difference of two Gumbel variables, out of one uniform; float32, for 1e-8 is nothing to narrower types."""
    return torch.log(uniform + 1e-8) - torch.log(1 - uniform + 1e-8)


def opened(logits: Tensor, noise: Tensor | None, tau: float) -> Opening:
    """Hard gates with the gradient of soft ones: (B, C) -> 1 where logits + noise >= 0, and at a row's largest.

    The gradient is that of sigmoid((logits + noise) / tau).
    """
    noisy = logits if noise is None else logits + noise
    soft = torch.sigmoid(noisy / tau)
    through = soft - soft.detach()  # exactly 0, with the gradient of soft
    return Opening(_at_least_one(noisy) + through, _at_least_one(logits) + through)


def _at_least_one(logits: Tensor) -> Tensor:
    logits = logits.detach()
    return (logits >= 0).to(logits.dtype).scatter_(1, logits.argmax(1, keepdim=True), 1)
