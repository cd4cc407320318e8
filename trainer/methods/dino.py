"""DINO: the student predicts the centred, sharpened output of its own running average."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.methods.joint_embedding import LossOut, Method, ViewCounts, check_weights, split_views, weighted
from trainer.methods.losses import dino_targets, mean_entropy, swapped_prediction
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import DINOHead
from trainer.schedules import Progress, ramp


@dataclass(frozen=True, kw_only=True, slots=True)
class DINOConfig:
    """DINO's head, temperatures and loss weights."""

    name: Literal["dino"]
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_prototypes: int
    head_norm: bool
    """BatchNorm in the head: on for CNNs, off for ViTs."""
    norm_last_layer: bool = True
    """Keep the prototypes at length 1 (their gain frozen)."""
    student_temp: float = 0.1
    teacher_temp: float = 0.07
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int
    """teacher_temp rises in a straight line over this many epochs."""
    center_momentum: float = 0.9
    freeze_last_layer_epochs: int = 1
    global_weight: float
    """Weight of the mean over pairs of global views (alpha in SSLight)."""
    local_weight: float
    """Weight of the mean over global-local pairs (beta in SSLight)."""
    global_only: bool = False
    """The global term alone, with weight 1; the two weights are then not used, and there may be no local views."""

    def __post_init__(self) -> None:
        for field in ("student_temp", "teacher_temp", "warmup_teacher_temp", "num_prototypes"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        if not 0 <= self.center_momentum < 1:
            raise ValueError(f"center_momentum must lie in [0, 1), got {self.center_momentum}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with DINO in this recipe, or None."""
        if counts.global_views < 2:
            return f"DINO needs at least 2 global views, got {counts.global_views}"
        if teacher == "none":
            return "DINO needs a teacher; set teacher.kind to ema"
        return check_weights(self, counts)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "DINO":
        """DINO around the backbone."""
        head = DINOHead(
            num_features(backbone),
            hidden_dim=self.hidden_dim,
            bottleneck_dim=self.bottleneck_dim,
            num_prototypes=self.num_prototypes,
            norm=self.head_norm,
            train_gain=not self.norm_last_layer,
        )
        return DINO(self, Branch(backbone, head), counts)


class DINO(Method):
    """DINO, arXiv 2104.14294, with SSLight's two weights; the teacher sees the global views only."""

    center: Tensor

    def __init__(self, config: DINOConfig, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        self.config = config
        self.register_buffer("center", torch.zeros(config.num_prototypes))
        self._teacher_sums: list[Tensor] = []
        self._teacher_rows = 0

    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """The global views."""
        return split_views(views, self.counts.global_views * self.batch_size(views))[0]

    def teacher_temp(self, progress: Progress) -> float:
        """The teacher's temperature, by epoch as published."""
        config = self.config
        return ramp(config.warmup_teacher_temp, config.teacher_temp, progress.epoch, config.warmup_teacher_temp_epochs)

    def scheduled(self, progress: Progress) -> dict[str, float]:
        """The teacher's temperature."""
        return {"teacher temperature": self.teacher_temp(progress)}

    def objective(self, student: Tensor, teacher: Tensor | None, progress: Progress) -> LossOut:
        """Every student view against the teacher's other global views."""
        assert teacher is not None
        teacher_temp = self.teacher_temp(progress)
        targets = dino_targets(teacher, self.center, temperature=teacher_temp)
        loss = weighted(self.config, *swapped_prediction(student, targets, temperature=self.config.student_temp))
        self._remember(teacher)
        return LossOut(loss.total, loss.parts | {"teacher_temp": teacher_temp} | self._health(targets))

    @torch.no_grad()
    def _health(self, targets: Tensor) -> dict[str, Tensor | float]:
        """Entropy 0 or ln K, or a mean target as sharp as each target, would be a collapse."""
        mean_target = targets.mean((0, 1))
        return {
            "teacher_entropy": mean_entropy(targets),
            "prototype_entropy": torch.special.entr(mean_target).sum(),
            "center_norm": self.center.norm(),
        }

    @torch.no_grad()
    def _remember(self, teacher: Tensor) -> None:
        self._teacher_sums.append(teacher.sum((0, 1), dtype=torch.float32))
        self._teacher_rows += teacher.shape[0] * teacher.shape[1]

    @torch.no_grad()
    def after_step(self, *, applied: bool) -> None:
        """center <- m center + (1 - m) mean of all the teacher's rows, over views, micro-batches and ranks."""
        if applied:
            rows = self._teacher_rows * distributed.world()
            mean = distributed.sum_over_ranks(torch.stack(self._teacher_sums).sum(0)) / rows
            self.center.lerp_(mean, 1 - self.config.center_momentum)
        self._teacher_sums, self._teacher_rows = [], 0

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The prototypes."""
        prototypes = self.student.head.get_submodule("last_layer")
        return [parameter for parameter in prototypes.parameters() if parameter.requires_grad]

    def frozen(self, progress: Progress) -> bool:
        """In the first epoch, as published."""
        return progress.epoch < self.config.freeze_last_layer_epochs
