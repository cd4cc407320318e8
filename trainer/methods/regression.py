"""Feature regression: an MLP on the student's features says what a frozen teacher's features are; no head is needed."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.methods.joint_embedding import (
    LossOut,
    Method,
    ViewCounts,
    check_weights,
    split_views,
    too_few_views,
    weighted,
)
from trainer.methods.losses import Pairing, partners
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import PlainMLP
from trainer.schedules import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig:
    """The regression's head, distance and loss weights."""

    name: Literal["regression"]
    wants_tokens: ClassVar[bool] = False
    takes_features: ClassVar[bool] = True
    """Of the teacher, which then needs no head."""
    out_dim: int
    """Length of the teacher's features."""
    mlp_head: PlainMLP
    """Thrown away after training; the deeper, the better the features below it. source: SimReg"""
    distance: Literal["cosine", "mse"] = "cosine"
    """cosine: 2 - 2 cos, which is the squared distance of unit vectors; mse: the mean square over the numbers."""
    pairing: Pairing = "same_view"
    """Whether a global view of the student meets the teacher's features of itself, or of the other global views."""
    global_weight: float
    """Weight of the mean over global pairs (alpha in SSLight)."""
    local_weight: float
    """Weight of the mean over global-local pairs (beta in SSLight)."""
    global_only: bool = False
    """The global term alone, with weight 1; the two weights are then not used, and there may be no local views."""

    def __post_init__(self) -> None:
        if self.out_dim < 1:
            raise ValueError(f"out_dim must be at least 1, got {self.out_dim}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with the regression in this recipe, or None."""
        return need_frozen(teacher) or too_few_views("regression", self.pairing, counts) or check_weights(self, counts)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "Regression":
        """The regression around the backbone."""
        head = self.mlp_head.build(num_features(backbone), self.out_dim)
        return Regression(self, Branch(backbone, head), counts)


def need_frozen(teacher: str) -> str | None:
    """What is wrong with a teacher that is not frozen: an average of the student would follow it anywhere."""
    if teacher == "frozen":
        return None
    return f"it takes a frozen teacher's features, which do not collapse, got teacher.kind {teacher}; set it to frozen"


class Regression(Method):
    """SimReg, arXiv 2201.05131, with SSLight's two weights; the teacher sees the global views."""

    def __init__(self, config: RegressionConfig, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        self.config = config

    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """The global views."""
        return split_views(views, self.counts.global_views * self.batch_size(views))[0]

    def objective(self, student: Tensor, teacher: Tensor | None, progress: Progress) -> LossOut:
        """Every view's distance to the teacher's features of its partners."""
        assert teacher is not None
        config, num_globals = self.config, self.counts.global_views
        wanted = partners(config.pairing, num_views=len(student), num_targets=len(teacher))
        with torch.autocast(student.device.type, enabled=False):
            measure = cosine_distance if config.distance == "cosine" else square_distance
            pairs = [[measure(view.float(), teacher[t]) for t in of] for view, of in zip(student, wanted, strict=True)]
            losses = torch.stack([torch.stack(of_view).mean() for of_view in pairs])
        local_loss = losses[num_globals:].mean() if self.counts.local_views else None
        loss = weighted(config, losses[:num_globals].mean(), local_loss)
        return LossOut(loss.total, loss.parts | {"teacher_similarity": _similarity(student[0], teacher[wanted[0][0]])})


def cosine_distance(students: Tensor, features: Tensor) -> Tensor:
    """Mean over rows of 2 - 2 cos: (B, D), (B, D) -> ()."""
    return 2 - 2 * F.cosine_similarity(students, features, dim=-1).mean()


def square_distance(students: Tensor, features: Tensor) -> Tensor:
    """Mean over rows and numbers of the squared difference: (B, D), (B, D) -> ()."""
    return F.mse_loss(students, features)


@torch.no_grad()
def _similarity(students: Tensor, features: Tensor) -> Tensor:
    """How far the student has come, whatever the distance: the mean cosine, 1 at the end."""
    return F.cosine_similarity(students.float(), features.float(), dim=-1).mean()
