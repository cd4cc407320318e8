"""SEED: the student ranks a queue of images by similarity as a frozen teacher does, which needs no head for that."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainer import distributed
from trainer.methods.joint_embedding import (
    LossOut,
    Method,
    ViewCounts,
    check_weights,
    split_views,
    too_few_views,
    weighted,
)
from trainer.methods.losses import Pairing, Partners, partners
from trainer.methods.queue import KeyQueue
from trainer.methods.regression import need_frozen
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import PlainMLP
from trainer.schedules import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class SEEDConfig:
    """SEED's head, queue, temperatures and loss weights."""

    name: Literal["seed"]
    wants_tokens: ClassVar[bool] = False
    takes_features: ClassVar[bool] = True
    """Of the teacher, which then needs no head."""
    out_dim: int
    """Length of the teacher's features."""
    mlp_head: PlainMLP
    queue_size: int = 65_536
    """The teacher's features of so many images, over all ranks."""
    student_temp: float = 0.2
    teacher_temp: float = 0.01
    pairing: Pairing = "same_view"
    """Whether a global view of the student meets the teacher's similarities of itself, or of the other global views."""
    global_weight: float
    """Weight of the mean over global pairs (alpha in SSLight)."""
    local_weight: float
    """Weight of the mean over global-local pairs (beta in SSLight)."""
    global_only: bool = False
    """The global term alone, with weight 1; the two weights are then not used, and there may be no local views."""

    def __post_init__(self) -> None:
        for field in ("out_dim", "queue_size", "student_temp", "teacher_temp"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with SEED in this recipe, or None."""
        if self.queue_size % global_batch:
            near = max(1, round(self.queue_size / global_batch)) * global_batch
            return (
                f"queue_size {self.queue_size} must be a multiple of optim.global_batch {global_batch}; {near} is near"
            )
        return need_frozen(teacher) or too_few_views("SEED", self.pairing, counts) or check_weights(self, counts)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "SEED":
        """SEED around the backbone."""
        head = self.mlp_head.build(num_features(backbone), self.out_dim)
        return SEED(self, Branch(backbone, head), counts)


class SEED(Method):
    """SEED, arXiv 2101.04731, with SSLight's two weights; the teacher sees the global views.

    The queue holds the teacher's features of the first view alone, so that no image stands in it twice at a time.
    """

    def __init__(self, config: SEEDConfig, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        self.config = config
        self.queue = KeyQueue(config.out_dim, config.queue_size)
        self._new_keys: list[Tensor] = []

    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """The global views."""
        return split_views(views, self.counts.global_views * self.batch_size(views))[0]

    def objective(self, student: Tensor, teacher: Tensor | None, progress: Progress) -> LossOut:
        """Every view's similarities against those of the teacher's features of its partners."""
        assert teacher is not None
        config, num_globals = self.config, self.counts.global_views
        wanted = partners(config.pairing, num_views=len(student), num_targets=len(teacher))
        with torch.autocast(student.device.type, enabled=False):
            units, features = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
            losses: Tensor = _Matching.apply(
                units, features, self.queue.keys, wanted, config.student_temp, config.teacher_temp
            )
        self._new_keys.append(features[0])
        local_loss = losses[num_globals:].mean() if self.counts.local_views else None
        loss = weighted(config, losses[:num_globals].mean(), local_loss)
        similarity = (units[0] * features[wanted[0][0]]).sum(-1).mean().detach()
        return LossOut(loss.total, loss.parts | {"teacher_similarity": similarity})

    @torch.no_grad()
    def after_step(self, *, applied: bool) -> None:
        """Put the step's features, of all ranks and micro-batches, into the queue."""
        if applied:
            self.queue.push(distributed.gather_equal_rows(torch.cat(self._new_keys)))
        self._new_keys = []


class _Matching(torch.autograd.Function):
    """Each view's cross-entropy of similarity distributions over the partner's own feature and the queue, (V,).

    students: (V, B, D) unit rows;  features: (T, B, D) unit rows;  queue: (D, Q) unit columns
    equals: mean over partners t and rows of -(softmax(f_t . keys / T_t) . log_softmax(s_v . keys / T_s)), where keys
    are f_t itself and the queue; the gradient, (p_s - p_t) . keys / T_s, is made while the (B, Q) similarities exist
    source: equation 4 of the paper
    """

    @staticmethod
    def forward(
        ctx: Any, students: Tensor, features: Tensor, queue: Tensor, wanted: Partners, student_temp: float,
        teacher_temp: float,
    ) -> Tensor:  # fmt: skip
        losses = students.new_zeros(len(students))
        gradient = torch.zeros_like(students) if ctx.needs_input_grad[0] else None
        for t, own in enumerate(features):
            target = F.softmax(_similarities(own, own, queue) / teacher_temp, dim=-1)
            for v in (v for v, of in enumerate(wanted) if t in of):
                share = 1 / len(wanted[v])
                log_probs = F.log_softmax(_similarities(students[v], own, queue) / student_temp, dim=-1)
                losses[v] -= share * torch.linalg.vecdot(target, log_probs).mean()
                if gradient is not None:
                    pulls = log_probs.exp_().sub_(target)
                    gradient[v] += share * (pulls[:, :1] * own + pulls[:, 1:] @ queue.T)
        ctx.save_for_backward(gradient)
        ctx.scale = 1 / (students.shape[1] * student_temp)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (of_losses * ctx.scale).view(-1, 1, 1), None, None, None, None, None


def _similarities(rows: Tensor, own: Tensor, queue: Tensor) -> Tensor:
    """(B, D) rows with their own feature, and with the queue: (B, 1 + Q)."""
    return torch.cat([torch.linalg.vecdot(rows, own)[:, None], rows @ queue], dim=1)
