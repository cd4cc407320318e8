"""What every method is: a student with an objective, which the engine wraps, and state that follows the steps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer.methods.losses import Pairing, weigh
from trainer.methods.passes import Budgets, Passed, groups_for, pairs_of, pass_gated
from trainer.methods.probe import LinearProbe
from trainer.models.backbones import Branch, num_features
from trainer.schedules import Progress


class LossOut(NamedTuple):
    """An objective's value and what is worth logging of it; a tuple, since DeepSpeed walks through outputs."""

    total: Tensor
    parts: dict[str, Tensor | float]
    """Detached scalars under the names of metrics.jsonl."""
    views_finite: Tensor | None = None
    """(P,) whether all features of each of the student's passes are finite; `Method.forward` adds it."""


class ViewCounts(NamedTuple):
    """How many views each image has; global views come first."""

    global_views: int
    local_views: int


class MethodConfig(Protocol):
    """What a recipe's `method:` block must offer, whatever the method."""

    @property
    def wants_tokens(self) -> bool:
        """Whether the teacher shall return its patch tokens beside the class token."""

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with the method in this recipe, or None."""

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "Method":
        """The method around a backbone, its head freshly initialised."""


class Method(nn.Module, ABC):
    """A student, its objective, the budgets of its gates, and buffers such as a centre or a queue.

    The loop calls, for every micro-batch, `teacher_views` -> teacher -> `forward`; after every step `after_step`.
    Whatever a method learns from a micro-batch for its buffers it keeps aside until the step was really applied.
    Nothing here may read a value from the device: that would stop the host until the device has caught up.
    """

    def __init__(self, student: Branch, counts: ViewCounts, *, num_unseen: int = 0, num_dense: int = 0) -> None:
        """num_unseen: how many of the first views the student does not see;  num_dense: how many it must see dense."""
        super().__init__()
        self.student = student
        self.counts = counts
        self.num_unseen = num_unseen
        pairs = pairs_of(student.backbone)
        self.groups = groups_for(pairs, counts, num_unseen=num_unseen, num_dense=num_dense)
        self.seen_views = tuple(view for group in self.groups for view in group.views)
        """The view of each of the student's P passes; P is V where there are no gates."""
        self.budgets = Budgets(student.backbone, self.groups)
        self.probe: LinearProbe | None = None

    def add_probe(self, num_classes: int) -> None:
        """Let a linear classifier train beside the student, on features that it cannot change."""
        self.probe = LinearProbe(num_features(self.student.backbone), num_classes)

    def adopt(self, prototypes: Tensor | None) -> None:
        """Take note of a frozen teacher's (K, D) prototypes; most methods have no use for them.

        prototypes: None for a teacher whose scores are no mere product with some
        raises: ValueError if the method scores with them, and cannot with these
        """

    def student_views(self, views: list[Tensor]) -> list[Tensor]:
        """The views that the student sees: one (V_i * B, 3, S_i, S_i) tensor per size, view-major, globals first."""
        return split_views(views, self.num_unseen * self.batch_size(views))[1]

    @abstractmethod
    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """The views that the teacher sees, in the same form; a method without a teacher is not asked."""

    @abstractmethod
    def objective(self, student: Any, teacher: Tensor | None, progress: Progress) -> LossOut:
        """The loss of one micro-batch.

        student: (P, B, D) the student's head output, a row for each of `seen_views`, dense passes first; or what else
        the method's `outputs` makes
        teacher: (T, B, D) the teacher's for `teacher_views`, (T, B, 1 + N, D) with the tokens of N patches behind the
        class token's; None without a teacher
        """

    def outputs(self, views: list[Tensor], progress: Progress, sample_ids: Sequence[int] | None) -> Passed:
        """The student on its views."""
        batch = self.batch_size(views)
        if self.budgets:
            return pass_gated(self.student, each_view(views, batch), self.groups)
        features = self.student.features(self.student_views(views))
        return Passed(features, per_view(self.student.head(features), batch))

    def forward(
        self,
        views: list[Tensor],
        teacher: Tensor | None,
        progress: Progress,
        labels: Tensor | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> LossOut:
        """The student on its views, the objective, and beside it the probe's loss on the student's first view.

        views: one tensor (V_i * B, 3, S_i, S_i) per size, view-major, globals first
        teacher: (T * B, D) the teacher's head output for `teacher_views(views)`, or (T * B, 1 + N, D); None without one
        labels: (B,), for the probe alone
        sample_ids: (B,) known to the host, for methods that draw something for each image
        """
        batch = self.batch_size(views)
        features, student, bills = self.outputs(views, progress, sample_ids)
        loss = self.objective(student, None if teacher is None else per_view(teacher, batch), progress)
        penalty, of_gates = self.budgets.loss(bills, progress)
        loss = LossOut(loss.total + penalty, loss.parts | of_gates)
        finite = per_view(features.detach(), batch).isfinite().flatten(1).all(1)
        if self.probe is None:
            return loss._replace(views_finite=finite)
        assert labels is not None
        of_probe, parts = self.probe.loss(features[:batch], labels)
        return LossOut(loss.total + of_probe, loss.parts | {"loss/ssl": loss.total.detach()} | parts, finite)

    def after_step(self, *, applied: bool) -> None:
        """Move the method's buffers by what the step's micro-batches brought; drop that if the step was skipped.

        Of itself a method has none but the multipliers of its budgets.
        """
        self.budgets.after_step(applied=applied)

    def scheduled(self, progress: Progress) -> dict[str, float]:
        """What of the method itself changes with the steps, for those who look at a recipe."""
        return {}

    def rewritten_parameters(self) -> list[nn.Parameter]:
        """Parameters that `after_step` changes itself; the engine's own copies must follow."""
        return []

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that stay as they are while `frozen(progress)` holds."""
        return []

    def frozen(self, progress: Progress) -> bool:
        """Whether the frozen parameters still are."""
        return False

    def batch_size(self, views: list[Tensor]) -> int:
        """B, from the views' tensors."""
        rows = sum(len(group) for group in views)
        return rows // sum(self.counts)


def split_views(views: list[Tensor], rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Cut a list of view tensors after `rows` rows; no data is copied."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    for group in views:
        head, tail = group[:rows], group[rows:]
        rows -= len(head)
        before += [head] if len(head) else []
        after += [tail] if len(tail) else []
    return before, after


def each_view(views: list[Tensor], batch_size: int) -> list[Tensor]:
    """The (B, 3, S_v, S_v) images of every view, one after the other; no data is copied."""
    return [images for group in views for images in torch.split(group, batch_size)]


def per_view(rows: Tensor, batch_size: int) -> Tensor:
    """(V * B, ...) view-major rows as (V, B, ...)."""
    return rows.view(-1, batch_size, *rows.shape[1:])


def too_few_views(title: str, pairing: Pairing, counts: ViewCounts) -> str | None:
    """Swapped pairs need two global views."""
    least = 2 if pairing == "swapped" else 1
    return f"{title} needs at least {least} global views, got {counts.global_views}" if counts[0] < least else None


class LossWeights(Protocol):
    """The fields that every method's config has for SSLight's two terms."""

    @property
    def global_weight(self) -> float:
        """Weight of the mean over global pairs (alpha)."""

    @property
    def local_weight(self) -> float:
        """Weight of the mean over global-local pairs (beta)."""

    @property
    def global_only(self) -> bool:
        """The global term alone, with weight 1; the two weights are then not used."""


def weighted(config: LossWeights, global_loss: Tensor, local_loss: Tensor | None) -> LossOut:
    """The two terms under the config's weights, and each for itself."""
    global_weight = 1.0 if config.global_only else config.global_weight
    total = weigh(global_loss, local_loss, global_weight=global_weight, local_weight=config.local_weight)
    parts: dict[str, Tensor | float] = {"loss/global": global_loss.detach()}
    if local_loss is not None:
        parts["loss/local"] = local_loss.detach()
    return LossOut(total, parts)


def check_weights(config: LossWeights, counts: ViewCounts) -> str | None:
    """The two SSLight weights must be ones that the views can use."""
    if config.global_only:
        if counts.local_views == 0:
            return None
        return (
            f"global_only leaves {counts.local_views} local views without a use, and cutting and forwarding them costs "
            "most of a step; set views.local_views.count=0, or global_only=false"
        )
    if min(config.global_weight, config.local_weight) < 0:
        return f"global_weight and local_weight must be at least 0, got {config.global_weight}, {config.local_weight}"
    if counts.local_views == 0 and config.local_weight > 0:
        return f"local_weight is {config.local_weight} but there are no local views; set global_only=true, or add some"
    return None
