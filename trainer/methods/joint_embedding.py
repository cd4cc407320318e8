"""What every method is: a student with an objective, which the engine wraps, and state that follows the steps."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from trainer.models.backbones import Branch
from trainer.schedules import Progress


class LossOut(NamedTuple):
    """An objective's value and what is worth logging of it; a tuple, since DeepSpeed walks through outputs."""

    total: Tensor
    parts: dict[str, Tensor | float]
    """Detached scalars under the names of metrics.jsonl."""


class ViewCounts(NamedTuple):
    """How many views each image has; global views come first."""

    global_views: int
    local_views: int


class MethodConfig(Protocol):
    """What a recipe's `method:` block must offer, whatever the method."""

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with the method in this recipe, or None."""

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "Method":
        """The method around a backbone, its head freshly initialised."""


class Method(nn.Module, ABC):
    """A student, its objective, and buffers such as a centre or a queue.

    The loop calls, for every micro-batch, `teacher_views` -> teacher -> `forward`; after every step `after_step`.
    Whatever a method learns from a micro-batch for its buffers it keeps aside until the step was really applied.
    """

    def __init__(self, student: Branch, counts: ViewCounts) -> None:
        super().__init__()
        self.student = student
        self.counts = counts

    @abstractmethod
    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """The views that the teacher sees, in the student's form: one (V_i * B, 3, S_i, S_i) tensor per size."""

    @abstractmethod
    def forward(self, views: list[Tensor], teacher: Tensor, progress: Progress) -> LossOut:
        """The loss of one micro-batch.

        views: one tensor (V_i * B, 3, S_i, S_i) per size, view-major, globals first
        teacher: (V_t * B, D) the teacher's head output for `teacher_views(views)`
        """

    @abstractmethod
    def after_step(self, *, applied: bool) -> None:
        """Move the method's buffers by what the step's micro-batches brought; drop that if the step was skipped."""

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


def per_view(rows: Tensor, batch_size: int) -> Tensor:
    """(V * B, D) view-major rows as (V, B, D)."""
    return rows.view(-1, batch_size, rows.shape[-1])


def check_weights(config: Any, counts: ViewCounts) -> str | None:
    """The two SSLight weights must be ones that the views can use."""
    if min(config.global_weight, config.local_weight) < 0:
        return f"global_weight and local_weight must be at least 0, got {config.global_weight}, {config.local_weight}"
    if counts.local_views == 0 and config.local_weight > 0:
        return f"local_weight is {config.local_weight} but there are no local views; set it to 0, or add local views"
    return None
