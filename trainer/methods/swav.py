"""SwAV: the student predicts, from one view, to which prototypes another view was assigned, or a frozen teacher's."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
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
from trainer.methods.losses import Pairing, mean_entropy, num_without_partner, paired_prediction
from trainer.methods.queue import EmbeddingQueue
from trainer.methods.sinkhorn import sinkhorn
from trainer.models.backbones import Branch, num_features
from trainer.models.heads import PlainMLP, Prototypes, SwAVHead, initialise_linears
from trainer.schedules import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class SwAVConfig:
    """SwAV's head, assignment, queue and loss weights."""

    name: Literal["swav"]
    wants_tokens: ClassVar[bool] = False
    """Whether the teacher shall return its patch tokens beside the class token."""
    takes_gates: ClassVar[bool] = True
    hidden_dim: int = 4096
    out_dim: int = 128
    num_prototypes: int
    mlp_head: PlainMLP | None = None
    """A plain MLP in place of SwAV's head: to embeddings that are not normalised, or to logits without prototypes."""
    codes: Literal["student", "teacher"] = "student"
    """Whose scores are made into codes: the student's own, or those of a frozen teacher against its prototypes."""
    targets: Literal["global_views", "first_view"] = "global_views"
    """Which views get codes."""
    prototypes: Literal["own", "teacher", "none"] = "own"
    """What the student's embeddings are scored against; none: mlp_head yields the scores itself."""
    renormalise_prototypes: bool = True
    """Give own prototypes length 1 again after each step."""
    temperature: float = 0.1
    epsilon: float = 0.05
    """Entropy of the assignment: the smaller, the harder the codes."""
    sinkhorn_iterations: int = 3
    """0 for softmax(scores / epsilon), which balances nothing."""
    hard_codes: bool = False
    """A view's code is its strongest prototype alone, after the balancing."""
    queue_size: int
    """Embeddings (with codes: teacher, scores) kept for the assignment, over all ranks, for each view that gets codes;
    0 for none."""
    queue_start_epoch: int = 15
    """The first epoch whose embeddings enter the queue; it is used once it is full."""
    freeze_prototypes_epochs: int = 1
    pairing: Pairing = "swapped"
    """swapped: a global view predicts the codes of the others; same_view: its own, for frozen teachers. Local views
    predict the codes of every view that has some."""
    global_weight: float
    """Weight of the mean over pairs of global views (alpha in SSLight)."""
    local_weight: float
    """Weight of the mean over global-local pairs (beta in SSLight)."""
    global_only: bool = False
    """The global term alone, with weight 1; the two weights are then not used, and there may be no local views."""

    def __post_init__(self) -> None:
        for field in ("hidden_dim", "out_dim", "num_prototypes", "temperature", "epsilon"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        for field in ("sinkhorn_iterations", "queue_size", "queue_start_epoch", "freeze_prototypes_epochs"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")

    def check(self, counts: ViewCounts, *, teacher: str, global_batch: int) -> str | None:
        """What is wrong with SwAV in this recipe, or None."""
        if too_few := too_few_views("SwAV", self.pairing, counts):
            return too_few
        fault = self._fault_without_teacher(teacher) if self.codes == "student" else self._fault_with_teacher(teacher)
        if fault is not None:
            return fault
        if self.queue_size % global_batch:
            near = max(1, self.queue_size // global_batch) * global_batch  # rounded down, as the published code does
            wanted = f"must be a multiple of optim.global_batch {global_batch}, or 0 for no queue"
            return f"queue_size {self.queue_size} {wanted}; {near} is near"
        return check_weights(self, counts)

    def _fault_without_teacher(self, teacher: str) -> str | None:
        if teacher != "none":
            return (
                f"SwAV has no teacher, got teacher.kind {teacher}; set teacher={{kind: none}}, or method.codes=teacher "
                "for a frozen one"
            )
        if (self.prototypes, self.mlp_head, self.targets) != ("own", None, "global_views"):
            return (
                "prototypes, mlp_head and targets are for codes: teacher; set prototypes=own, mlp_head=null and "
                "targets=global_views"
            )
        if self.sinkhorn_iterations == 0 or self.pairing == "same_view":
            return (
                "the student's own codes collapse with sinkhorn_iterations 0 or pairing same_view; set "
                "sinkhorn_iterations=3 and pairing=swapped, or codes=teacher"
            )
        return None

    def _fault_with_teacher(self, teacher: str) -> str | None:
        if teacher != "frozen":
            return f"codes: teacher needs a frozen teacher, got teacher.kind {teacher}; set teacher.kind to frozen"
        if self.prototypes == "none" and self.mlp_head is None:
            return "prototypes: none needs an mlp_head that yields the scores; give one, or set prototypes=own"
        return None

    def build(self, backbone: nn.Module, counts: ViewCounts) -> "SwAV":
        """SwAV around the backbone, which keeps the initialisation that the recipe gave it."""
        embed_dim = num_features(backbone)
        if self.mlp_head is None:
            head: nn.Module = SwAVHead(embed_dim, hidden_dim=self.hidden_dim, out_dim=self.out_dim)
        else:
            out_dim = self.num_prototypes if self.prototypes == "none" else self.out_dim
            head = self.mlp_head.build(embed_dim, out_dim)
        return SwAV(self, Branch(backbone, head), counts)


class SwAV(Method):
    """SwAV, arXiv 2006.09882, with SSLight's two weights; with codes: teacher, RoB-SwAV, arXiv 2301.09451.

    Codes are balanced over a micro-batch of all ranks, and the queue. The number of ranks therefore changes nothing,
    but two micro-batches of 8 are two assignments of 8 samples, which is not one of 16: prefer ranks, or a larger
    queue, to accumulation.
    """

    def __init__(self, config: SwAVConfig, student: Branch, counts: ViewCounts) -> None:
        num_targets = 1 if config.targets == "first_view" else counts.global_views
        super().__init__(
            student,
            counts,
            num_unseen=num_without_partner(config.pairing, num_targets),
            num_dense=num_targets if config.codes == "student" else 0,  # no gate decides what a code is
        )
        self.config, self.num_targets = config, num_targets
        scored = config.prototypes != "none"
        self.prototypes = Prototypes(config.out_dim, config.num_prototypes) if scored else None
        if self.prototypes is not None and config.prototypes == "teacher":
            self.prototypes.requires_grad_(False).weight.fill_(torch.nan)  # until `adopt` brings the teacher's
        width = config.out_dim if config.codes == "student" else config.num_prototypes
        self.queue = EmbeddingQueue(config.queue_size, self.num_targets, width)
        self._new_rows: list[Tensor] = []

    @torch.no_grad()
    def adopt(self, prototypes: Tensor | None) -> None:
        """Score embeddings against a frozen teacher's (K, D) prototypes, if the recipe says so."""
        if self.config.prototypes != "teacher":
            return
        assert self.prototypes is not None
        weight = self.prototypes.weight
        if prototypes is None:
            raise ValueError(
                "method.prototypes teacher: the teacher's head is a plain MLP without any; set method.prototypes=own"
            )
        if prototypes.shape != weight.shape:
            raise ValueError(
                f"method.prototypes teacher: wanted {tuple(weight.shape)} of num_prototypes x out_dim, and the "
                f"teacher's are {tuple(prototypes.shape)}; set method.num_prototypes and method.out_dim to these"
            )
        weight.copy_(prototypes)

    def add_probe(self, num_classes: int) -> None:
        """The probe, initialised as every linear layer here."""
        super().add_probe(num_classes)
        assert self.probe is not None
        initialise_linears(self.probe)

    def teacher_views(self, views: list[Tensor]) -> list[Tensor]:
        """The views that get codes."""
        return split_views(views, self.num_targets * self.batch_size(views))[0]

    def objective(self, student: Tensor, teacher: Tensor | None, progress: Progress) -> LossOut:
        """Every view against the codes of its partners; a code_entropy of ln K would be a collapse."""
        config = self.config
        scores = student if self.prototypes is None else self.prototypes(student)
        if config.codes == "student":
            to_queue, of_targets = (rows[: self.num_targets].detach() for rows in (student, scores))
        else:
            assert teacher is not None
            to_queue = of_targets = teacher
        codes = self._codes(of_targets)
        if config.queue_size and progress.epoch >= config.queue_start_epoch:
            self._new_rows.append(to_queue)
        terms = paired_prediction(
            scores, codes, temperature=config.temperature, pairing=config.pairing,
            num_globals=self.counts.global_views, views=self.seen_views,
        )  # fmt: skip
        loss = weighted(config, *terms)
        return LossOut(loss.total, loss.parts | {"code_entropy": mean_entropy(codes)})

    @torch.no_grad()
    def _codes(self, scores: Tensor) -> Tensor:
        """(T, B, K) scores -> codes, each row summing to 1."""
        codes = self._soft_codes(scores)
        if not self.config.hard_codes:
            return codes
        return torch.zeros_like(codes).scatter_(-1, codes.argmax(-1, keepdim=True), 1.0)

    def _soft_codes(self, scores: Tensor) -> Tensor:
        """Codes that are balanced together with the queue once that is full."""
        batch, scores = scores.shape[1], scores.float()
        if self.config.sinkhorn_iterations == 0:
            return F.softmax(scores / self.config.epsilon, dim=-1)
        if self.queue.is_full:
            scores = torch.cat([self._queued_scores(), scores], dim=1)
        codes = sinkhorn(scores, epsilon=self.config.epsilon, iterations=self.config.sinkhorn_iterations)
        return codes[:, -batch:]

    def _queued_scores(self) -> Tensor:
        """This rank's share of the queue: a teacher's scores as they were, embeddings against today's prototypes."""
        rows = self.queue.share()
        if self.config.codes == "teacher":
            return rows
        assert self.prototypes is not None
        scores: Tensor = self.prototypes(rows)
        return scores

    @torch.no_grad()
    def after_step(self, *, applied: bool) -> None:
        """Unit prototypes for the next step; the step's embeddings, of all ranks and micro-batches, into the queue."""
        if applied:
            for prototypes in self._renormalised():
                prototypes.renormalise()
            if self._new_rows:
                mine = torch.cat(self._new_rows, dim=1).transpose(0, 1)
                self.queue.push(distributed.gather_equal_rows(mine))
        self._new_rows = []
        super().after_step(applied=applied)

    def _renormalised(self) -> list[Prototypes]:
        own = self.config.prototypes == "own" and self.config.renormalise_prototypes
        return [self.prototypes] if own and self.prototypes is not None else []

    def rewritten_parameters(self) -> list[nn.Parameter]:
        """The prototypes, if their length stays 1."""
        return [prototypes.weight for prototypes in self._renormalised()]

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Own prototypes."""
        own = self.prototypes if self.config.prototypes == "own" else None
        return [] if own is None else list(own.parameters())

    def frozen(self, progress: Progress) -> bool:
        """In the first epoch, as published."""
        return progress.epoch < self.config.freeze_prototypes_epochs
