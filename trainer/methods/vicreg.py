"""VICReg: two views agree, while each number of the embedding keeps its variance and repeats no other."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import distributed
from trainer.methods.joint_embedding import LossOut, ViewCounts
from trainer.methods.pairs import PairMethod, need_two_views
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import projector

EPS = 1e-4
"""Added to variances below the root. source: the paper, equation 1"""


@dataclass(frozen=True, kw_only=True, slots=True)
class VICRegConfig:
    """VICReg's projector and the weights of its three terms."""

    name: Literal["vicreg"]
    wants_tokens: ClassVar[bool] = False
    takes_gates: ClassVar[bool] = True
    hidden_dim: int = 8192
    out_dim: int = 8192
    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0

    def __post_init__(self) -> None:
        for field in ("hidden_dim", "out_dim"):
            if getattr(self, field) < 2:
                raise ValueError(f"{field} must be at least 2, got {getattr(self, field)}")
        for field in ("invariance_weight", "variance_weight", "covariance_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with VICReg in this recipe, or None."""
        return need_two_views("VICReg", counts, teacher)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "VICReg":
        """VICReg around the backbone."""
        head = projector(num_features(backbone), hidden_dim=self.hidden_dim, out_dim=self.out_dim)
        return VICReg(self, Branch(backbone, head), counts)


class VICReg(PairMethod):
    """VICReg, arXiv 2105.04906; variances and covariances are those of all ranks' rows.

    The two regularising terms are sums over both views, as in solo-learn and arXiv 2301.09164; the authors' own code
    halves the variance term.
    """

    def __init__(self, config: VICRegConfig, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        self.config = config

    def compare(self, first: Tensor, second: Tensor) -> LossOut:
        """The three terms of (B, D) outputs, and what they were."""
        config = self.config
        with torch.autocast(first.device.type, enabled=False):
            first, second = first.float(), second.float()
            invariance = F.mse_loss(first, second)
            everyone = [distributed.gather_for_common_loss(rows) for rows in (first, second)]
            variance = torch.stack([variance_term(rows) for rows in everyone]).sum()
            covariance = torch.stack([covariance_term(rows) for rows in everyone]).sum()
        total = (
            config.invariance_weight * invariance
            + config.variance_weight * variance
            + config.covariance_weight * covariance
        )
        parts = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return LossOut(total, {f"loss/{name}": value.detach() for name, value in parts.items()})


def variance_term(rows: Tensor) -> Tensor:
    """How far the standard deviations of (N, D) rows are below 1, mean over the D: equation 1."""
    return F.relu(1 - torch.sqrt(rows.var(0) + EPS)).mean()


def covariance_term(rows: Tensor) -> Tensor:
    """Sum of squares of the covariances between different numbers of (N, D) rows, over D: equation 4."""
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / (len(rows) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / rows.shape[1]
