"""MSN: a student that misses patches predicts to which prototypes its running average assigns a whole view."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import distributed
from trainer.methods.joint_embedding import (
    LossOut,
    Method,
    ViewCounts,
    check_weights,
    per_view,
    split_views,
    too_few_views,
    weighted,
)
from trainer.methods.losses import Pairing, mean_entropy, num_without_partner, paired_prediction
from trainer.methods.masks import kept_patches, on_device
from trainer.methods.passes import Passed
from trainer.methods.sinkhorn import sinkhorn
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import CosinePrototypes, MSNHead, PlainMLP
from trainer.models.tokens import grid_of, pooled, require_patches, tokens_of
from trainer.schedules import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class MSNConfig:
    """MSN's head, assignment, patch drop and loss weights."""

    name: Literal["msn"]
    wants_tokens: ClassVar[bool] = False
    """Whether the teacher shall return its patch tokens beside the class token."""
    hidden_dim: int = 2048
    out_dim: int = 256
    num_prototypes: int
    head_norm: bool = True
    """BatchNorm in the head, as published for ViTs too."""
    mlp_head: PlainMLP | None = None
    """A plain MLP to num_prototypes logits in place of head and prototypes: what a frozen teacher needs."""
    targets: Literal["global_views", "first_view"] = "first_view"
    """Which views the teacher sees; the first alone, as published, or all global ones."""
    temperature: float = 0.1
    sharpening: float = 0.25
    """Targets are softmax(scores / (temperature x sharpening))."""
    sinkhorn_iterations: int = 3
    """Balance the targets over prototypes; 0 leaves them as they are."""
    me_max_weight: float = 1.0
    """Weight of ln K minus the entropy of the mean prediction, which keeps all prototypes in use."""
    patch_drop: float = 0.15
    """Share of the patches of its global views that the student does not get; 0 for networks without patches."""
    pairing: Pairing = "swapped"
    """swapped: a global view predicts the targets of the others; same_view: its own, for frozen teachers. Local views
    predict those of every view that the teacher sees."""
    global_weight: float
    """Weight of the mean over the student's global views, the anchors."""
    local_weight: float
    """Weight of the mean over local views, the focal ones."""
    global_only: bool = False
    """The global term alone, with weight 1; the two weights are then not used, and there may be no local views."""

    def __post_init__(self) -> None:
        for field in ("hidden_dim", "out_dim", "num_prototypes", "temperature", "sharpening"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        for field in ("sinkhorn_iterations", "me_max_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")
        if not 0 <= self.patch_drop < 1:
            raise ValueError(f"patch_drop must lie in [0, 1), got {self.patch_drop}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with MSN in this recipe, or None."""
        if too_few := too_few_views("MSN", self.pairing, counts):
            return too_few
        if teacher == "none":
            return "MSN needs a teacher; set teacher.kind to ema, or to frozen"
        if teacher == "frozen" and self.mlp_head is None:
            return "a frozen teacher has its own prototypes, and the student's head must yield logits; give mlp_head"
        if teacher == "ema" and self.mlp_head is not None:
            return "mlp_head is for a frozen teacher; set mlp_head=null, or teacher.kind=frozen"
        return check_weights(self, counts)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "MSN":
        """MSN around the backbone.

        raises: ValueError if patches shall be dropped of a network that has none
        """
        if self.patch_drop > 0:
            require_patches(backbone, f"patch_drop {self.patch_drop}", "set method.patch_drop=0")
        embed_dim = num_features(backbone)
        if self.mlp_head is not None:
            return MSN(self, Branch(backbone, self.mlp_head.build(embed_dim, self.num_prototypes)), counts)
        head = MSNHead(embed_dim, hidden_dim=self.hidden_dim, out_dim=self.out_dim, norm=self.head_norm)
        return MSN(self, Branch(backbone, head), counts)


class MSN(Method):
    """MSN, arXiv 2204.07141, with SSLight's two weights; with mlp_head the student of RoB-MSN, arXiv 2301.09451.

    Targets are balanced, and predictions spread, over a micro-batch of all ranks: ranks change nothing, accumulation
    does. The student's prototypes serve the teacher's embeddings too, as published.
    """

    def __init__(self, config: MSNConfig, student: Branch, counts: ViewCounts) -> None:
        num_targets = 1 if config.targets == "first_view" else counts.global_views
        super().__init__(student, counts, num_unseen=num_without_partner(config.pairing, num_targets))
        self.config, self.num_targets = config, num_targets
        self.prototypes: CosinePrototypes | None = None
        if config.mlp_head is None:
            self.prototypes = CosinePrototypes(config.out_dim, config.num_prototypes)

    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """The first view, or all global ones."""
        return split_views(views, self.num_targets * self.batch_size(views))[0]

    def outputs(self, views: list[Tensor], progress: Progress, sample_ids: Sequence[int] | None) -> Passed:
        """The student on global views without some of their patches, and on whole local views."""
        batch, drop = self.batch_size(views), self.config.patch_drop
        if drop == 0:
            return super().outputs(views, progress, sample_ids)
        network: Any = self.student.backbone
        (images,), local_views = split_views(
            self.student_views(views), (self.counts.global_views - self.num_unseen) * batch
        )
        num_patches = math.prod(grid_of(network, images))
        kept = kept_patches(num_patches, drop=drop, seed=progress.seed, step=progress.step)
        tokens = tokens_of(network, images, kept=on_device(kept, images.device))
        features = torch.cat([pooled(network, tokens), *(network(group) for group in local_views)])
        return Passed(features, per_view(self.student.head(features), batch))

    def objective(self, student: Tensor, teacher: Tensor | None, progress: Progress) -> LossOut:
        """Every view against the targets of its partners, and how unevenly the predictions use the prototypes."""
        assert teacher is not None
        config = self.config
        logits = student if self.prototypes is None else self.prototypes(student)
        targets = self._targets(teacher)
        terms = paired_prediction(
            logits,
            targets,
            temperature=config.temperature,
            pairing=config.pairing,
            num_globals=self.counts.global_views,
        )
        loss = weighted(config, *terms)
        total, parts = loss.total, loss.parts | {"target_entropy": mean_entropy(targets)}
        if config.me_max_weight > 0:
            unevenness = me_max(logits, temperature=config.temperature)
            total = total + config.me_max_weight * unevenness
            parts["loss/me_max"] = unevenness.detach()
        return LossOut(total, parts)

    @torch.no_grad()
    def _targets(self, teacher: Tensor) -> Tensor:
        """(T, B, K) of a frozen teacher's scores, or of (T, B, D) embeddings against the student's prototypes."""
        scores = teacher if self.prototypes is None else self.prototypes(teacher)
        log_targets = F.log_softmax(scores.float() / (self.config.temperature * self.config.sharpening), dim=-1)
        if self.config.sinkhorn_iterations == 0:
            return log_targets.exp_()
        return sinkhorn(log_targets, epsilon=1.0, iterations=self.config.sinkhorn_iterations)


def me_max(logits: Tensor, *, temperature: float) -> Tensor:
    """ln K minus the entropy of the mean prediction over all views, images and ranks; 0 if prototypes are used evenly.

    logits: (V, B, K)
    source: MSN, src/losses.py; the gradient is that of a rank's own rows, which the mean over ranks completes
    """
    with torch.autocast(logits.device.type, enabled=False):
        mine = F.softmax(logits.float() / temperature, dim=-1).mean((0, 1))
        mean = mine + (distributed.mean_over_ranks(mine.detach()) - mine.detach())
        unevenness: Tensor = math.log(len(mean)) - torch.special.entr(mean).sum()
        return unevenness
