"""The budget of a gated network: what its gates open in a step, and the penalties that bring that to the target.

Legend: B images, G gates; a ratio is the cost of the gated network over that of the dense one.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import distributed
from trainer.methods.center import PendingMean
from trainer.models.gates import Gates, Opening
from trainer.models.gating import cost_at, counts, gating_of
from trainer.models.macs import Cost, uniform_density
from trainer.schedules import Progress

FORGETTING = 10.0
"""The bounds' grip falls to exp(-10) over a run. source: the paper's exp(-0.02 epoch) over its 500 epochs"""


def published_penalty(ratio: Tensor, target: float, strength: float) -> Tensor:
    """strength x (ratio - target)^2; its force vanishes at the target, where the objective's does not."""
    return strength * (ratio - target) ** 2


def lagrangian(ratio: Tensor, target: float, strength: float, multiplier: Tensor) -> Tensor:
    """multiplier x (ratio - target) + strength / 2 x (ratio - target)^2.

    source: augmented Lagrangian, Hestenes 1969; the multiplier becomes the force that the objective exerts
    """
    return multiplier * (ratio - target) + strength / 2 * (ratio - target) ** 2


def bound(densities: Tensor, density: float, grip: float) -> Tensor:
    """How far the (G,) shares of open channels are out of [grip x density, 1 - grip x (1 - density)], squared.

    source: arXiv 2301.09164's code; a grip of 1 wants every gate at the density, of 0 anywhere
    """
    below, above = F.relu(grip * density - densities), F.relu(densities - (1 - grip * (1 - density)))
    return (below**2 + above**2).mean()


def annealed(target: float, done: float, anneal: float) -> float:
    """The target after a share of the run: in a straight line from 1 down to it over the share `anneal`."""
    return target if done >= anneal else 1 + (target - 1) * done / anneal


class Spent(NamedTuple):
    """What the gates of some images cost; all with gradients."""

    ratio: Tensor
    """(B,) of the channels that were computed."""
    hard_ratio: Tensor
    """(B,) of those that would be, without noise: what the network costs when it is used."""
    densities: Tensor
    """(B, G) shares of open channels."""


def spent(openings: list[Opening], cost: Cost) -> Spent:
    """What a pass's openings cost."""
    sampled, hard = counts(openings, hard=False), counts(openings, hard=True)
    return Spent(cost.ratio(sampled).float(), cost.ratio(hard).float(), sampled / torch.tensor(cost.widths).to(sampled))


class Budget(nn.Module):
    """The penalties of one network's gates, and the Lagrangian's multiplier, which follows the steps.

    Ratios are means over all ranks' images, so that the number of ranks does not change the training.
    """

    multiplier: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.settings: Gates = gating_of(backbone).settings
        self.register_buffer("multiplier", torch.zeros(()))
        self._errors = PendingMean()

    def loss(self, passes: list[Spent], density: float, progress: Progress) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Penalty and bound of a micro-batch's gated passes, and what to log of them.

        density: of all gates, that meets the target
        """
        rows = [torch.cat([p.ratio[:, None], p.hard_ratio[:, None], p.densities], dim=1) for p in passes]
        means = distributed.gather_for_common_loss(torch.cat(rows)).mean(0)
        ratio, hard_ratio, densities = means[0], means[1], means[2:]
        settings, target = self.settings, annealed(self.settings.target, progress.done, self.settings.anneal)
        if settings.penalty == "published":
            target, density = settings.target, math.sqrt(settings.target)
            penalty = published_penalty(ratio, target, settings.strength)
        else:
            penalty = lagrangian(hard_ratio, target, settings.strength, self.multiplier)
        of_bound = bound(densities, density, math.exp(-FORGETTING * progress.done))
        self._errors.add((hard_ratio.detach() - target)[None, None])
        parts = {"ratio": ratio, "hard_ratio": hard_ratio, "penalty": penalty, "bound": of_bound}
        logged: dict[str, Tensor | float] = {f"gates/{name}": value.detach() for name, value in parts.items()}
        return penalty + settings.bound_weight * of_bound, logged | {
            "gates/target": target,
            "gates/multiplier": self.multiplier.clone(),
        }

    @torch.no_grad()
    def after_step(self, *, applied: bool) -> None:
        """multiplier <- multiplier + multiplier_lr x (hard ratio - target), the step's mean."""
        if applied and self.settings.penalty == "lagrangian":
            self.multiplier.add_(self._errors.mean()[0], alpha=self.settings.multiplier_lr)
        self._errors.forget()


def density_for(backbone: nn.Module, size: int) -> float:
    """The share of open channels, the same in all gates, that meets the backbone's target on images of a size."""
    return uniform_density(cost_at(backbone, size), gating_of(backbone).settings.target)
