"""DINO: the student predicts the centred, sharpened output of its own running average, or a frozen teacher's."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer.methods.center import PendingMean
from trainer.methods.joint_embedding import (
    LossOut,
    Method,
    ViewCounts,
    check_weights,
    split_views,
    too_few_views,
    weighted,
)
from trainer.methods.losses import Pairing, dino_targets, mean_entropy, paired_prediction
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import DINOHead, PlainMLP
from trainer.schedules import Progress, ramp


@dataclass(frozen=True, kw_only=True, slots=True)
class DINOSettings:
    """Head, temperatures and loss weights, which DINO and iBOT have in common."""

    name: str
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_prototypes: int
    head_norm: bool
    """BatchNorm in the head: on for CNNs, off for ViTs."""
    norm_last_layer: bool = True
    """Keep the prototypes at length 1 (their gain frozen)."""
    mlp_head: PlainMLP | None = None
    """A plain MLP in place of the head that the fields above describe."""
    student_temp: float = 0.1
    teacher_temp: float = 0.07
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int
    """teacher_temp rises in a straight line over this many epochs; 0 for a constant one."""
    centering: Literal["ema", "none"] = "ema"
    """Subtract a running mean of the teacher's outputs from them; a frozen teacher cannot collapse and needs none."""
    center_momentum: float = 0.9
    freeze_last_layer_epochs: int = 1
    pairing: Pairing = "swapped"
    """swapped: a global view predicts what the teacher makes of the others; same_view: of itself, for frozen teachers.
    Local views predict the teacher's output for every global view."""
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

    def fault(self, title: str, counts: ViewCounts, teacher: str) -> str | None:
        """What is wrong with these settings in a recipe, or None."""
        if too_few := too_few_views(title, self.pairing, counts):
            return too_few
        if teacher == "none":
            return f"{title} needs a teacher; set teacher.kind to ema, or to frozen"
        return check_weights(self, counts)

    def build_head(self, backbone: nn.Module) -> nn.Module:
        """The student's head, freshly initialised."""
        if self.mlp_head is not None:
            return self.mlp_head.build(num_features(backbone), self.num_prototypes)
        return DINOHead(
            num_features(backbone),
            hidden_dim=self.hidden_dim,
            bottleneck_dim=self.bottleneck_dim,
            num_prototypes=self.num_prototypes,
            norm=self.head_norm,
            train_gain=not self.norm_last_layer,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DINOConfig(DINOSettings):
    """DINO's settings."""

    name: Literal["dino"]
    wants_tokens: ClassVar[bool] = False
    """Whether the teacher shall return its patch tokens beside the class token."""
    takes_gates: ClassVar[bool] = True

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with DINO in this recipe, or None."""
        return self.fault("DINO", counts, teacher)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "DINO":
        """DINO around the backbone."""
        return DINO(self, Branch(backbone, self.build_head(backbone)), counts)


class DINO(Method):
    """DINO, arXiv 2104.14294, with SSLight's two weights; the teacher sees the global views only."""

    center: Tensor

    def __init__(self, config: DINOSettings, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        self.config = config
        self.register_buffer("center", torch.zeros(config.num_prototypes))
        self._teacher_rows = PendingMean()

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
        """Every student view against its partners among the teacher's global views."""
        assert teacher is not None
        config, teacher_temp = self.config, self.teacher_temp(progress)
        targets = dino_targets(teacher, self.center, temperature=teacher_temp)
        terms = paired_prediction(
            student, targets, temperature=config.student_temp, pairing=config.pairing, views=self.seen_views
        )
        loss = weighted(config, *terms)
        if config.centering == "ema":
            self._teacher_rows.add(teacher)
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
    def after_step(self, *, applied: bool) -> None:
        """center <- m center + (1 - m) mean of all the teacher's rows, over views, micro-batches and ranks."""
        if applied and self.config.centering == "ema":
            self.center.lerp_(self._teacher_rows.mean(), 1 - self.config.center_momentum)
        self._teacher_rows.forget()
        super().after_step(applied=applied)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The prototypes, where the head has some."""
        if not isinstance(self.student.head, DINOHead):
            return []
        return [parameter for parameter in self.student.head.last_layer.parameters() if parameter.requires_grad]

    def frozen(self, progress: Progress) -> bool:
        """In the first epoch, as published."""
        return progress.epoch < self.config.freeze_last_layer_epochs
