"""Methods that compare two views of one student, without a teacher, and how gates enter such a comparison."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.methods.budget import Budget, Spent, density_for, spent
from trainer.methods.joint_embedding import LossOut, Method, ViewCounts, per_view
from trainer.models.backbones import Branch
from trainer.models.gates import Mode
from trainer.models.gating import cost_at, gating_of, in_mode, is_gated
from trainer.schedules import Progress


class Pair(NamedTuple):
    """Two passes, by number, and what their comparison counts."""

    first: int
    second: int
    weight: float


class Plan(NamedTuple):
    """What a step runs, view by view, and what it compares."""

    passes: tuple[tuple[int, Mode], ...]
    """A view and the mode in which the student sees it."""
    pairs: tuple[Pair, ...]


FOUR: tuple[tuple[int, Mode], ...] = ((0, "dense"), (1, "dense"), (0, "sampled"), (1, "sampled"))
PLANS: dict[str, Plan] = {
    "dense": Plan(FOUR[:2], (Pair(0, 1, 1.0),)),
    "cross": Plan(((1, "dense"), (0, "sampled")), (Pair(1, 0, 1.0),)),
    "cross_symmetric": Plan(FOUR, (Pair(2, 1, 1 / 2), Pair(3, 0, 1 / 2))),
    "full": Plan(FOUR, (Pair(0, 1, 1 / 3), Pair(2, 3, 1 / 3), Pair(2, 1, 1 / 6), Pair(3, 0, 1 / 6))),
}
"""Dense passes come first, so that a probe reads the dense network's features."""


class PairOut(NamedTuple):
    """The student's passes, and what the gated ones among them cost."""

    outputs: Tensor
    """(P, B, D), of each pass."""
    spent: list[Spent]
    size: int
    """Pixels of the views."""


class PairMethod(Method):
    """A student whose two views are compared. Each pass has BatchNorm statistics of its own, in the head too."""

    def __init__(self, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        backbone = student.backbone
        self.plan = PLANS[gating_of(backbone).settings.pairs if is_gated(backbone) else "dense"]
        self.budget = Budget(backbone) if is_gated(backbone) else None

    @abstractmethod
    def compare(self, first: Tensor, second: Tensor) -> LossOut:
        """The loss of one pair of (B, D) outputs; the order of the two must not matter."""

    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """None: there is no teacher."""
        return []

    def outputs(self, views: list[Tensor], progress: Progress, sample_ids: Sequence[int] | None) -> tuple[Tensor, Any]:
        """Every pass of the plan: features (P * B, embed_dim), and its outputs with what its gates cost."""
        each = per_view(views[0], self.batch_size(views))
        features, costs = [], []
        for view, mode in self.plan.passes:
            of_pass, cost = self._pass(each[view], mode)
            features.append(of_pass)
            costs += cost
        outputs = torch.stack([self.student.head(of_pass) for of_pass in features])
        return torch.cat(features), PairOut(outputs, costs, each.shape[-1])

    def _pass(self, images: Tensor, mode: Mode) -> tuple[Tensor, list[Spent]]:
        backbone = self.student.backbone
        if mode == "dense":
            return backbone(images), []
        with in_mode(backbone, mode) as openings:
            features: Tensor = backbone(images)
        return features, [spent(openings, cost_at(backbone, images.shape[-1]))]

    def objective(self, student: PairOut, teacher: Tensor | None, progress: Progress) -> LossOut:
        """The plan's pairs, weighed, and the budget's penalties where there are gates."""
        losses = [(self.compare(student.outputs[i], student.outputs[j]), w) for i, j, w in self.plan.pairs]
        total = torch.stack([weight * loss.total for loss, weight in losses]).sum()
        parts: dict[str, Tensor | float] = {
            name: torch.stack([torch.as_tensor(loss.parts[name]) * weight for loss, weight in losses]).sum()
            for name in losses[0][0].parts
        }
        if self.budget is None:
            return LossOut(total, parts)
        penalty, of_gates = self.budget.loss(student.spent, density_for(self.student.backbone, student.size), progress)
        return LossOut(total + penalty, parts | of_gates)

    def after_step(self, *, applied: bool) -> None:
        """The budget's multiplier, if there is one."""
        if self.budget is not None:
            self.budget.after_step(applied=applied)


def need_two_views(title: str, counts: ViewCounts, teacher: str) -> str | None:
    """What is wrong with these views, or with a teacher, in a recipe of such a method."""
    if counts != (2, 0):
        return f"{title} compares two global views, got {counts.global_views} and {counts.local_views} local ones"
    if teacher != "none":
        return f"{title} has no teacher, got teacher.kind {teacher}; set it to none"
    return None
