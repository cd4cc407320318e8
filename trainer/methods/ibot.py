"""iBOT: DINO, whose student also predicts the teacher's outputs for patches that it does not get to see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.methods.center import PendingMean
from trainer.methods.dino import DINO, DINOSettings
from trainer.methods.joint_embedding import LossOut, ViewCounts, per_view, split_views
from trainer.methods.losses import dino_targets, weighted_prediction
from trainer.methods.masks import block_masks, on_device
from trainer.methods.passes import Passed
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import DINOHead, WeightNormLinear
from trainer.models.tokens import TokenBranch, grid_of, pooled, tokens_of
from trainer.schedules import Progress, ramp


@dataclass(frozen=True, kw_only=True, slots=True)
class IBOTConfig(DINOSettings):
    """iBOT's settings: DINO's for the class token, and what is done to patches."""

    name: Literal["ibot"]
    patch_weight: float = 1.0
    """Weight of the patches' loss; 0 leaves the class token's alone, for networks that have no patches."""
    teacher_patch_temp: float = 0.07
    warmup_teacher_patch_temp: float = 0.04
    """It rises to teacher_patch_temp as teacher_temp does."""
    mask: Literal["ibot", "none"] = "ibot"
    """ibot: blocks of the student's global views are hidden, and the loss is over them; none: the student sees
    everything, and the loss is over all patches."""
    mask_prob: float = 0.5
    """How many of the global views have a mask."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Least and largest share of the patches in it."""
    prototypes: Literal["own", "teacher"] = "own"
    """What the student's embeddings are scored against; teacher: a frozen teacher's, which never move."""

    def __post_init__(self) -> None:
        DINOSettings.__post_init__(self)
        for field in ("teacher_patch_temp", "warmup_teacher_patch_temp"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        if self.patch_weight < 0:
            raise ValueError(f"patch_weight must be at least 0, got {self.patch_weight}")
        if not 0 <= self.mask_prob <= 1:
            raise ValueError(f"mask_prob must lie in [0, 1], got {self.mask_prob}")
        if not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] <= 1:
            raise ValueError(f"mask_ratio must be (low, high) with 0 <= low <= high <= 1, got {self.mask_ratio}")

    @property
    def wants_tokens(self) -> bool:
        """Whether the teacher shall return its patch tokens beside the class token."""
        return self.patch_weight > 0

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with iBOT in this recipe, or None."""
        if self.wants_tokens and self.head_norm and self.mlp_head is None:
            return "BatchNorm would mix class tokens and patches, of which there are more; set head_norm=false"
        if self.prototypes == "teacher" and (teacher != "frozen" or self.mlp_head is not None):
            return "prototypes: teacher needs a frozen one, and a head that meets some; set prototypes=own, or both"
        if not self.wants_tokens and self.mask == "ibot":
            return "patch_weight 0 gives masks nothing to predict; set mask=none, or a patch_weight above 0"
        return self.fault("iBOT", counts, teacher)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "IBOT":
        """iBOT around the backbone.

        raises: ValueError if it has no patches and shall predict some
        """
        branch = TokenBranch if self.wants_tokens else Branch
        return IBOT(self, branch(backbone, self.build_head(backbone)), counts)


class Projected(NamedTuple):
    """What iBOT's objective gets of the student."""

    class_tokens: Tensor
    """(V, B, K) logits."""
    patches: Tensor | None
    """(M, K) logits of the patches that are to be predicted; None without a loss of patches."""
    places: Tensor | None
    """(M,) their rows among the G * B * (1 + N) tokens of the teacher."""
    weights: Tensor | None
    """(M,) their weights: the mean over an image's patches, then over images and views."""


class IBOT(DINO):
    """iBOT, arXiv 2111.07832, with one head for class tokens and patches, and one pass of the student for both."""

    config: IBOTConfig
    patch_center: Tensor
    mask_token: nn.Parameter | None

    def __init__(self, config: IBOTConfig, student: Branch, counts: ViewCounts) -> None:
        super().__init__(config, student, counts)
        self.register_parameter("mask_token", None)
        if config.wants_tokens:
            self.register_buffer("patch_center", torch.zeros(config.num_prototypes))
            self._teacher_patches = PendingMean()
        if config.mask == "ibot":
            self.mask_token = nn.Parameter(torch.zeros(num_features(student.backbone)))
        if config.prototypes == "teacher":
            self._last_layer().requires_grad_(False).weight_v.fill_(torch.nan)  # until `adopt` brings the teacher's

    def _last_layer(self) -> WeightNormLinear:
        assert isinstance(self.student.head, DINOHead)
        return self.student.head.last_layer

    @torch.no_grad()
    def adopt(self, prototypes: Tensor | None) -> None:
        """Score embeddings against a frozen teacher's (K, D) prototypes, if the recipe says so.

        source: RoB as released, which copies them into the student's head after every update
        """
        if self.config.prototypes != "teacher":
            return
        last_layer = self._last_layer()
        wanted = tuple(last_layer.weight_v.shape)
        if prototypes is None or tuple(prototypes.shape) != wanted:
            came = "in a plain MLP without any" if prototypes is None else tuple(prototypes.shape)
            raise ValueError(
                f"method.prototypes teacher: wanted {wanted} of num_prototypes x bottleneck_dim, and the teacher's are "
                f"{came}; set method.num_prototypes and method.bottleneck_dim to these, or method.prototypes=own"
            )
        last_layer.weight_g.copy_(prototypes.norm(dim=1, keepdim=True))
        last_layer.weight_v.copy_(prototypes)

    def teacher_patch_temp(self, progress: Progress) -> float:
        """The teacher's temperature for patches, which warms up as long as that for class tokens."""
        config, epochs = self.config, self.config.warmup_teacher_temp_epochs
        return ramp(config.warmup_teacher_patch_temp, config.teacher_patch_temp, progress.epoch, epochs)

    def scheduled(self, progress: Progress) -> dict[str, float]:
        """The teacher's temperatures."""
        of_patches = {"patch temperature": self.teacher_patch_temp(progress)} if self.config.wants_tokens else {}
        return super().scheduled(progress) | of_patches

    def outputs(self, views: list[Tensor], progress: Progress, sample_ids: Sequence[int] | None) -> Passed:
        """The student on masked global and whole local views, and one pass of the head over all that is predicted."""
        batch = self.batch_size(views)
        if not self.config.wants_tokens:
            passed = super().outputs(views, progress, sample_ids)
            return passed._replace(outputs=Projected(passed.outputs, None, None, None))
        (images,), local_views = split_views(views, self.counts.global_views * batch)
        network: Any = self.student.backbone
        masks, hidden = self._masks(images, progress, sample_ids)
        tokens = tokens_of(network, images, masked=hidden, mask_token=self.mask_token)
        features = torch.cat([pooled(network, tokens), *(network(group) for group in local_views)])
        rows, weights = (on_device(array, images.device) for array in predicted(masks))
        places = rows + rows // masks.shape[1] + 1  # behind each image's class token
        patches = tokens[:, network.num_prefix_tokens :].flatten(0, 1).index_select(0, rows)
        logits = self.student.head(torch.cat([features, patches]))
        class_tokens = per_view(logits[: len(features)], batch)
        return Passed(features, Projected(class_tokens, logits[len(features) :], places, weights))

    def _masks(
        self, images: Tensor, progress: Progress, sample_ids: Sequence[int] | None
    ) -> tuple[NDArray[np.bool_], Tensor | None]:
        """Which patches of the (G * B) global views are predicted, and which of them are hidden, on the device."""
        config, num_views = self.config, self.counts.global_views
        high, wide = grid_of(self.student.backbone, images)
        if config.mask == "none":
            return np.ones((len(images), high * wide), dtype=np.bool_), None
        if sample_ids is None:
            raise ValueError("iBOT draws a mask for each image: wanted sample_ids beside the views, got none")
        masks = block_masks(
            sample_ids, num_views=num_views, grid=(high, wide), prob=config.mask_prob, ratio=config.mask_ratio,
            seed=progress.seed, epoch=progress.epoch,
        )  # fmt: skip
        return masks, on_device(masks, images.device)

    def objective(self, student: Tensor | Projected, teacher: Tensor | None, progress: Progress) -> LossOut:
        """DINO's loss of the class tokens, and the patches' with the teacher's patches at the same places."""
        assert teacher is not None
        assert isinstance(student, Projected)
        if student.patches is None or student.places is None or student.weights is None:
            return super().objective(student.class_tokens, teacher, progress)
        loss = super().objective(student.class_tokens, teacher[:, :, 0], progress)
        config, patches = self.config, teacher.flatten(0, 2).index_select(0, student.places)
        targets = dino_targets(patches, self.patch_center, temperature=self.teacher_patch_temp(progress))
        temperature = config.student_temp
        of_patches = weighted_prediction(student.patches, targets, student.weights, temperature=temperature)
        if config.centering == "ema":
            self._teacher_patches.add(teacher[:, :, 1:])
        parts = loss.parts | {"loss/patch": of_patches.detach()}
        return LossOut(loss.total + config.patch_weight * of_patches, parts)

    @torch.no_grad()
    def after_step(self, *, applied: bool) -> None:
        """DINO's centre, and one of its own for patches."""
        super().after_step(applied=applied)
        if self.config.wants_tokens:
            if applied and self.config.centering == "ema":
                self.patch_center.lerp_(self._teacher_patches.mean(), 1 - self.config.center_momentum)
            self._teacher_patches.forget()


def predicted(masks: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The rows of masked patches among all G * B * N, and what each counts: (M,) both.

    masks: (G * B, N)
    equals: the mean over the masked patches of an image, 0 where it has none, then over all images
    """
    counts = masks.sum(1)
    rows = np.flatnonzero(masks)
    return rows, (1.0 / (len(masks) * counts[rows // masks.shape[1]])).astype(np.float32)
