"""SimSiam: a predictor on one view meets the other, which is held still; no negatives, no average, no collapse."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.methods.joint_embedding import LossOut, ViewCounts
from trainer.methods.pairs import PairMethod, need_two_views
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import predictor, projector


@dataclass(frozen=True, kw_only=True, slots=True)
class SimSiamConfig:
    """SimSiam's projector and predictor."""

    name: Literal["simsiam"]
    wants_tokens: ClassVar[bool] = False
    takes_gates: ClassVar[bool] = True
    hidden_dim: int = 2048
    out_dim: int = 2048
    predictor_dim: int = 512
    """The narrow middle of the predictor."""

    def __post_init__(self) -> None:
        for field in ("hidden_dim", "out_dim", "predictor_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with SimSiam in this recipe, or None."""
        return need_two_views("SimSiam", counts, teacher)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "SimSiam":
        """SimSiam around the backbone."""
        head = projector(num_features(backbone), hidden_dim=self.hidden_dim, out_dim=self.out_dim, last_norm=True)
        return SimSiam(self, Branch(backbone, head), counts)


class SimSiam(PairMethod):
    """SimSiam, arXiv 2011.10566; the predictor's learning rate follows the schedule, where the paper's is constant."""

    def __init__(self, config: SimSiamConfig, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        self.predictor = predictor(config.out_dim, hidden_dim=config.predictor_dim)

    def compare(self, first: Tensor, second: Tensor) -> LossOut:
        """-(cos(p1, z2) + cos(p2, z1)) / 2 of (B, D) projections, with no gradient into the z."""
        first, second = first.float(), second.float()
        of_first = F.cosine_similarity(self.predictor(first), second.detach(), dim=-1).mean()
        of_second = F.cosine_similarity(self.predictor(second), first.detach(), dim=-1).mean()
        return LossOut(-(of_first + of_second) / 2, {"embedding_std": _spread(first)})


@torch.no_grad()
def _spread(rows: Tensor) -> Tensor:
    """sqrt(D) x standard deviation of unit rows: about 1 where they fill the sphere, 0 where they have collapsed."""
    units = F.normalize(rows, dim=-1)
    spread: Tensor = units.std(0).mean() * units.shape[1] ** 0.5
    return spread
