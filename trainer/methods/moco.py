"""MoCo v2 with multi-crop: every further view of an image must find the key of its first view in a queue."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.methods.joint_embedding import LossOut, Method, ViewCounts, check_weights, split_views, weighted
from trainer.methods.losses import info_nce, means_by_kind
from trainer.methods.queue import KeyQueue
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import MoCoHead
from trainer.schedules import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class MoCoConfig:
    """MoCo's head, queue and loss weights."""

    name: Literal["moco"]
    wants_tokens: ClassVar[bool] = False
    """Whether the teacher shall return its patch tokens beside the class token."""
    takes_gates: ClassVar[bool] = True
    hidden_dim: int = 2048
    out_dim: int = 128
    queue_size: int
    temperature: float = 0.2
    global_weight: float
    """Weight of the global query's loss (alpha in SSLight)."""
    local_weight: float
    """Weight of the mean over local queries (beta in SSLight)."""
    global_only: bool = False
    """The global term alone, with weight 1; the two weights are then not used, and there may be no local views."""

    def __post_init__(self) -> None:
        for field in ("temperature", "queue_size", "hidden_dim", "out_dim"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with MoCo in this recipe, or None."""
        if counts.global_views < 2:
            return f"MoCo needs at least 2 global views (one key, one query), got {counts.global_views}"
        if teacher == "none":
            return "MoCo needs a teacher, its key encoder; set teacher.kind to ema"
        if self.queue_size % global_batch:
            near = max(1, round(self.queue_size / global_batch)) * global_batch
            wanted = f"must be a multiple of optim.global_batch {global_batch}"
            return f"queue_size {self.queue_size} {wanted}; {near} is near"
        return check_weights(self, counts)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "MoCo":
        """MoCo around the backbone."""
        head = MoCoHead(num_features(backbone), hidden_dim=self.hidden_dim, out_dim=self.out_dim)
        return MoCo(self, Branch(backbone, head), counts)


class MoCo(Method):
    """MoCo v2, arXiv 2003.04297, wired as in SSLight: view 0 is the key, all others are queries, one queue for all.

    Keys are never shuffled over ranks: BatchNorm that counts over all ranks hides no key from its query either.
    """

    def __init__(self, config: MoCoConfig, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts, num_unseen=1)
        self.config = config
        self.queue = KeyQueue(config.out_dim, config.queue_size)
        self._new_keys: list[Tensor] = []

    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """The first view."""
        return split_views(views, self.batch_size(views))[0]

    def objective(self, student: Tensor, teacher: Tensor | None, progress: Progress) -> LossOut:
        """Each query's InfoNCE against its own key and the queue."""
        assert teacher is not None
        (keys,) = teacher
        losses = info_nce(student, keys, self.queue.keys, temperature=self.config.temperature)
        self._new_keys.append(keys.detach())
        loss = weighted(self.config, *means_by_kind(losses, self.seen_views, self.counts.global_views))
        return LossOut(loss.total, loss.parts | {"positive_similarity": self._alignment(student[0], keys)})

    @staticmethod
    @torch.no_grad()
    def _alignment(queries: Tensor, keys: Tensor) -> Tensor:
        return (queries.float() * keys.float()).sum(-1).mean()

    @torch.no_grad()
    def after_step(self, *, applied: bool) -> None:
        """Put the step's keys, of all ranks and micro-batches, into the queue."""
        if applied:
            self.queue.push(distributed.gather_equal_rows(torch.cat(self._new_keys)))
        self._new_keys = []
        super().after_step(applied=applied)
