"""Barlow Twins: each number of the embedding says the same of two views, and what no other number says."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.methods.joint_embedding import LossOut, ViewCounts
from trainer.methods.pairs import PairMethod, need_two_views
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import projector

EPS = 1e-5
"""Added to variances below the root. source: the BatchNorm without weights of the authors' code"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BarlowConfig:
    """Barlow Twins' projector and the weights of its two terms."""

    name: Literal["barlow"]
    wants_tokens: ClassVar[bool] = False
    takes_gates: ClassVar[bool] = True
    hidden_dim: int = 8192
    out_dim: int = 8192
    redundancy_weight: float = 0.0051
    """lambda, of correlations between different numbers."""
    scale: float = 0.024
    """Of the whole loss, which sums over out_dim^2 correlations; 0.024 is the authors' for LARS."""

    def __post_init__(self) -> None:
        for field in ("hidden_dim", "out_dim"):
            if getattr(self, field) < 2:
                raise ValueError(f"{field} must be at least 2, got {getattr(self, field)}")
        if self.redundancy_weight < 0:
            raise ValueError(f"redundancy_weight must be at least 0, got {self.redundancy_weight}")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with Barlow Twins in this recipe, or None."""
        return need_two_views("Barlow Twins", counts, teacher)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "BarlowTwins":
        """Barlow Twins around the backbone."""
        head = projector(num_features(backbone), hidden_dim=self.hidden_dim, out_dim=self.out_dim)
        return BarlowTwins(self, Branch(backbone, head), counts)


class BarlowTwins(PairMethod):
    """Barlow Twins, arXiv 2103.03230; means, deviations and correlations are those of all ranks' rows."""

    def __init__(self, config: BarlowConfig, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        self.config = config

    def compare(self, first: Tensor, second: Tensor) -> LossOut:
        """The two terms of (B, D) outputs, and what they were."""
        config = self.config
        with torch.autocast(first.device.type, enabled=False):
            everyone = [distributed.gather_for_common_loss(rows.float()) for rows in (first, second)]
            correlations = cross_correlation(*everyone)
            on_diagonal = correlations.diagonal()
            invariance = (1 - on_diagonal).square().sum()
            redundancy = correlations.square().sum() - on_diagonal.square().sum()
        total = config.scale * (invariance + config.redundancy_weight * redundancy)
        parts = {"invariance": invariance, "redundancy": redundancy}
        return LossOut(total, {f"loss/{name}": value.detach() for name, value in parts.items()})


def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlations over rows of each number of the one with each of the other: (N, D), (N, D) -> (D, D)."""
    first, second = (_standardised(rows) for rows in (first, second))
    correlations: Tensor = first.T @ second / len(first)
    return correlations


def _standardised(rows: Tensor) -> Tensor:
    standardised: Tensor = (rows - rows.mean(0)) / torch.sqrt(rows.var(0, correction=0) + EPS)
    return standardised
