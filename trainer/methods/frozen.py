"""The second branch of RoB: a trained network of someone else's, or of an earlier run, that nothing moves any more."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.models.backbones import Branch
from trainer.models.heads import FrozenHead

SCHEMES = ("file", "timm", "run")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Prototypes for a teacher that has none: spherical k-means on its features of train images."""

    count: int
    """How many; the method's num_prototypes."""
    num_images: int = 0
    """Images drawn from data.train; 0 for all. Each rank holds all their features for that: 4 bytes a number."""
    iterations: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("num_images", 0), ("iterations", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if 0 < self.num_images < self.count:
            raise ValueError(f"num_images must be 0 or at least count {self.count}, got {self.num_images}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """A teacher that stays as it came: RoB's replaced branch."""

    kind: Literal["frozen"]
    source: str
    """file:PATH (a published checkpoint, or a weights folder), timm:NAME (no head), run:DIR (a run of ours)."""
    branch: Literal["teacher", "student"] | None = None
    """Which of a source's networks; null: its teacher, or the only one it has."""
    name: str | None = None
    """The backbone's timm name, where the file does not show it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model for the backbone, such as {dynamic_img_size: true}."""
    mean: tuple[float, float, float] | None = None
    """What it was trained with; null: what the source says, or its published code."""
    std: tuple[float, float, float] | None = None
    prototypes: Fit | None = None
    """For a teacher without a head under a method that needs its prototypes."""
    cache_epochs: int = 0
    """Views repeat after so many epochs, and the teacher's embeddings of them are kept on the disk; 0 for none."""

    def __post_init__(self) -> None:
        scheme, colon, place = self.source.partition(":")
        if scheme not in SCHEMES or not colon or not place:
            raise ValueError(f"source must be file:PATH, timm:NAME or run:DIR, got {self.source!r}")
        if self.cache_epochs < 0:
            raise ValueError(f"cache_epochs must be at least 0, got {self.cache_epochs}")


class FrozenTeacher(nn.Module):
    """A backbone and its head, always in eval mode, without gradient, on its own normalisation of the student's views.

    Its output has two halves, `score(embed(views))`, of which the first is worth keeping: it is small and costs most.
    source: RoB, arXiv 2301.09451
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        branch: Branch,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        student_mean: tuple[float, ...],
        student_std: tuple[float, ...],
        tokens: bool = False,
    ) -> None:
        """tokens: also give each patch's output, behind the class token's"""
        super().__init__()
        self.branch = branch.float().requires_grad_(False)
        self.tokens = tokens
        own, theirs = torch.tensor([mean, std]).double(), torch.tensor([student_mean, student_std]).double()
        self.register_buffer("scale", (theirs[1] / own[1]).float().view(3, 1, 1))
        self.register_buffer("shift", ((theirs[0] - own[0]) / own[1]).float().view(3, 1, 1))
        self.is_same_input = torch.equal(own, theirs)
        self.eval()

    @property
    def head(self) -> FrozenHead:
        """Its projection and prototypes."""
        assert isinstance(self.branch.head, FrozenHead)
        return self.branch.head

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in eval mode, whatever is asked: running statistics, no dropout, no dropped paths."""
        return super().train(False)

    @torch.no_grad()
    def embed(self, views: list[Tensor]) -> Tensor:
        """What the prototypes are compared with: (T * B, D), or (T * B, 1 + N, D) with tokens."""
        return torch.cat([self.head.embed(self._features(self._own_input(group))) for group in views])

    def _own_input(self, images: Tensor) -> Tensor:
        return images if self.is_same_input else images * self.scale + self.shift

    def _features(self, images: Tensor) -> Tensor:
        backbone = self.branch.backbone
        if not self.tokens:
            features: Tensor = backbone(images)
            return features
        every: Tensor = backbone.forward_features(images)  # type: ignore[operator]
        prefix = int(backbone.num_prefix_tokens)  # type: ignore[arg-type]
        return torch.cat([every[:, :1], every[:, prefix:]], dim=1)  # registers are no one's target

    @torch.no_grad()
    def score(self, embeddings: Tensor) -> Tensor:
        """(..., D) embeddings -> (..., K) scores; the embeddings themselves where there are no prototypes."""
        return self.head.score(embeddings)

    def forward(self, views: list[Tensor]) -> Tensor:
        """The head's output for the views, (T * B, K) or (T * B, 1 + N, K), without gradient."""
        return self.score(self.embed(views))

    @cached_property
    def digest(self) -> str:
        """What identifies it: the hash of all its tensors, prototypes and normalisation included."""
        return digest_of(self)


def digest_of(module: nn.Module) -> str:
    """The hash of a module's tensors and their names, on whatever device."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
