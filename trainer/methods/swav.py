"""SwAV: the student predicts, from one view, to which prototypes another view of the image was assigned."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.methods.joint_embedding import LossOut, Method, ViewCounts, check_weights, weighted
from trainer.methods.losses import mean_entropy, swapped_prediction
from trainer.methods.queue import EmbeddingQueue
from trainer.methods.sinkhorn import sinkhorn
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import Prototypes, SwAVHead, initialise_linears
from trainer.schedules import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class SwAVConfig:
    """SwAV's head, assignment, queue and loss weights."""

    name: Literal["swav"]
    hidden_dim: int = 4096
    out_dim: int = 128
    num_prototypes: int
    temperature: float = 0.1
    epsilon: float = 0.05
    """Entropy of the assignment: the smaller, the harder the codes."""
    sinkhorn_iterations: int = 3
    queue_size: int
    """Embeddings kept for the assignment, over all ranks, for each assignment view; 0 for none."""
    queue_start_epoch: int = 15
    """The first epoch whose embeddings enter the queue; it is used once it is full."""
    freeze_prototypes_epochs: int = 1
    global_weight: float
    """Weight of the mean over pairs of global views (alpha in SSLight)."""
    local_weight: float
    """Weight of the mean over global-local pairs (beta in SSLight)."""
    global_only: bool = False
    """The global term alone, with weight 1; the two weights are then not used, and there may be no local views."""

    def __post_init__(self) -> None:
        for field in ("hidden_dim", "out_dim", "num_prototypes", "temperature", "epsilon", "sinkhorn_iterations"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        for field in ("queue_size", "queue_start_epoch", "freeze_prototypes_epochs"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with SwAV in this recipe, or None."""
        if counts.global_views < 2:
            return f"SwAV needs at least 2 global views, got {counts.global_views}"
        if teacher != "none":
            return f"SwAV has no teacher, got teacher.kind {teacher}; set teacher={{kind: none}}"
        if self.queue_size % global_batch:
            near = max(1, self.queue_size // global_batch) * global_batch  # rounded down, as the published code does
            wanted = f"must be a multiple of optim.global_batch {global_batch}, or 0 for no queue"
            return f"queue_size {self.queue_size} {wanted}; {near} is near"
        return check_weights(self, counts)

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "SwAV":
        """SwAV around the backbone, which keeps the initialisation that the recipe gave it."""
        head = SwAVHead(num_features(backbone), hidden_dim=self.hidden_dim, out_dim=self.out_dim)
        return SwAV(self, Branch(backbone, head), counts)


class SwAV(Method):
    """SwAV, arXiv 2006.09882, with SSLight's two weights; the global views are those that get codes.

    Codes are balanced over a micro-batch of all ranks, and the queue. The number of ranks therefore changes nothing,
    but two micro-batches of 8 are two assignments of 8 samples, which is not one of 16: prefer ranks, or a larger
    queue, to accumulation.
    """

    def __init__(self, config: SwAVConfig, student: Branch, counts: ViewCounts) -> None:
        super().__init__(student, counts)
        self.config = config
        self.prototypes = Prototypes(config.out_dim, config.num_prototypes)
        self.queue = EmbeddingQueue(config.queue_size, counts.global_views, config.out_dim)
        self._new_embeddings: list[Tensor] = []

    def add_probe(self, num_classes: int) -> None:
        """The probe, initialised as every linear layer here."""
        super().add_probe(num_classes)
        assert self.probe is not None
        initialise_linears(self.probe)

    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """None."""
        return []

    def objective(self, student: Tensor, teacher: Tensor | None, progress: Progress) -> LossOut:
        """Every view against the codes of the other global views; a code_entropy of ln K would be a collapse."""
        config = self.config
        scores = self.prototypes(student)
        codes = self._codes(scores[: self.counts.global_views].detach())
        if config.queue_size and progress.epoch >= config.queue_start_epoch:
            self._new_embeddings.append(student[: self.counts.global_views].detach())
        loss = weighted(config, *swapped_prediction(scores, codes, temperature=config.temperature))
        return LossOut(loss.total, loss.parts | {"code_entropy": mean_entropy(codes)})

    @torch.no_grad()
    def _codes(self, scores: Tensor) -> Tensor:
        """(G, B, K) scores -> codes, balanced together with the queue once that is full."""
        batch = scores.shape[1]
        if self.queue.is_full:
            scores = torch.cat([self.prototypes(self.queue.share()), scores], dim=1)
        codes = sinkhorn(scores, epsilon=self.config.epsilon, iterations=self.config.sinkhorn_iterations)
        return codes[:, -batch:]

    @torch.no_grad()
    def after_step(self, *, applied: bool) -> None:
        """Unit prototypes for the next step; the step's embeddings, of all ranks and micro-batches, into the queue."""
        if applied:
            self.prototypes.renormalise()
            if self._new_embeddings:
                mine = torch.cat(self._new_embeddings, dim=1).transpose(0, 1)
                self.queue.push(distributed.gather_equal_rows(mine))
        self._new_embeddings = []

    def rewritten_parameters(self) -> list[nn.Parameter]:
        """The prototypes, whose length stays 1."""
        return list(self.prototypes.parameters())

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The prototypes."""
        return list(self.prototypes.parameters())

    def frozen(self, progress: Progress) -> bool:
        """In the first epoch, as published."""
        return progress.epoch < self.config.freeze_prototypes_epochs
