"""Methods that compare two views of one student, without a teacher, and how gates enter such a comparison."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.methods.joint_embedding import LossOut, Method, ViewCounts, each_view
from trainer.methods.passes import Bill, Passed, pairs_of, pass_backbone
from trainer.models.backbones import Branch
from trainer.schedules import Progress


class Pair(NamedTuple):
    """Two passes, by number, and what their comparison counts."""

    first: int
    second: int
    weight: float


PAIRS: dict[str | None, tuple[Pair, ...]] = {
    None: (Pair(0, 1, 1.0),),
    "cross": (Pair(1, 0, 1.0),),
    "cross_symmetric": (Pair(2, 1, 1 / 2), Pair(3, 0, 1 / 2)),
    "full": (Pair(0, 1, 1 / 3), Pair(2, 3, 1 / 3), Pair(2, 1, 1 / 6), Pair(3, 0, 1 / 6)),
}
"""What is compared of the passes that `groups_for` names: without gates views 0 and 1; view 1 dense and view 0 gated;
both views dense, then both gated."""


class PairMethod(Method):
    """A student whose two views are compared. Each pass has BatchNorm statistics of its own, in the head too."""

    def __init__(self, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        self.pairs = PAIRS[pairs_of(student.backbone)]

    @abstractmethod
    def compare(self, first: Tensor, second: Tensor) -> LossOut:
        """The loss of one pair of (B, D) outputs; the order of the two must not matter."""

    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """None: there is no teacher."""
        return []

    def outputs(self, views: list[Tensor], progress: Progress, sample_ids: Sequence[int] | None) -> Passed:
        """Every pass for itself, in the backbone and in the head."""
        student, each = self.student, each_view(views, self.batch_size(views))
        features: list[Tensor] = []
        bills: list[Bill] = []
        for group in self.groups:
            for view in group.views:
                of_pass, cost = pass_backbone(student.backbone, each[view], group)
                features.append(of_pass)
                bills += cost
        return Passed(torch.cat(features), torch.stack([student.head(of_pass) for of_pass in features]), bills)

    def objective(self, student: Tensor, teacher: Tensor | None, progress: Progress) -> LossOut:
        """The pairs' losses, weighed."""
        losses = [(self.compare(student[i], student[j]), weight) for i, j, weight in self.pairs]
        total = torch.stack([weight * loss.total for loss, weight in losses]).sum()
        parts: dict[str, Tensor | float] = {
            name: torch.stack([torch.as_tensor(loss.parts[name]) * weight for loss, weight in losses]).sum()
            for name in losses[0][0].parts
        }
        return LossOut(total, parts)


def need_two_views(title: str, counts: ViewCounts, teacher: str) -> str | None:
    """What is wrong with these views, or with a teacher, in a recipe of such a method."""
    if counts != (2, 0):
        return f"{title} compares two global views, got {counts.global_views} and {counts.local_views} local ones"
    if teacher != "none":
        return f"{title} has no teacher, got teacher.kind {teacher}; set it to none"
    return None
