"""The objectives as pure functions of logits, targets and the two SSLight weights.

Legend: B images, V views of which G global and L local, P passes of the student (V of them unless its gates let a view
pass twice), T views of the teacher, K prototypes, Q queue length, D embed_dim.

K and Q reach 65,536, so that (V, B, K) logits take hundreds of MB. Both objectives therefore go through the views one
by one and make the gradient where the softmax already is: beside the logits and their gradient they hold (B, K) only.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Pairing = Literal["swapped", "same_view"]
"""Whether a view predicts the teacher's other views, as when a network teaches itself, or its own, as in RoB."""
Partners = tuple[tuple[int, ...], ...]
"""For each view of the student the teacher's views that it predicts, by number."""


def weigh(global_loss: Tensor, local_loss: Tensor | None, *, global_weight: float, local_weight: float) -> Tensor:
    """global_weight x (mean over global pairs) + local_weight x (mean over global-local pairs).

    source: SSLight, arXiv 2210.02808, section 3.3.4; (1/7, 6/7) is the plain mean for 2 + 6 views
    """
    if local_loss is None:
        return global_weight * global_loss
    return global_weight * global_loss + local_weight * local_loss


@torch.no_grad()
def dino_targets(teacher: Tensor, center: Tensor, *, temperature: float) -> Tensor:
    """softmax((teacher - center) / T) in float32: (G, B, K) logits and a (K,) centre -> (G, B, K)."""
    return F.softmax(teacher.float().sub(center).div_(temperature), dim=-1)


def partners(pairing: Pairing, *, num_views: int, num_targets: int) -> Partners:
    """Which of the teacher's views each of the student's must predict; view v of the one is view v of the other.

    swapped: all but itself; same_view: itself alone, and views that the teacher does not see predict all of its views
    """
    every = tuple(range(num_targets))
    if pairing == "same_view":
        return tuple((v,) if v < num_targets else every for v in range(num_views))
    return tuple(tuple(t for t in every if t != v) for v in range(num_views))


def num_without_partner(pairing: Pairing, num_targets: int) -> int:
    """How many of the first views the student need not see: the only target's own view has nothing left to predict."""
    return 1 if pairing == "swapped" and num_targets == 1 else 0


def paired_prediction(
    logits: Tensor, targets: Tensor, *, temperature: float, pairing: Pairing = "swapped",
    num_globals: int | None = None, views: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Cross-entropy of every student view with the mean target of its partners: DINO's, SwAV's, MSN's and RoB's loss.

    logits: (P, B, K), a row of logits for each of `views`
    targets: (T, B, K) float32 of the first T views, each row summing to 1
    num_globals: how many views are global, as many as there are targets by default
    views: which the student saw, some perhaps twice; by default all but those that `num_without_partner` counts
    returns: mean over the global views of the student, and over the local ones (None without locals)
    equals: means over pairs (i, v) of -(targets_i . log_softmax(logits_v / T)); a view's targets are averaged first, so
    that each view meets one log-softmax
    """
    skipped = num_without_partner(pairing, len(targets))
    num_globals = len(targets) if num_globals is None else num_globals
    if num_globals <= skipped:
        raise ValueError(f"swapped prediction needs at least 2 global views, got {num_globals}")
    views = range(skipped, skipped + len(logits)) if views is None else views
    of_views = partners(pairing, num_views=max(views) + 1, num_targets=len(targets))
    losses = predict(logits, targets, tuple(of_views[view] for view in views), temperature=temperature)
    return means_by_kind(losses, views, num_globals)


def means_by_kind(losses: Tensor, views: Sequence[int], num_globals: int) -> tuple[Tensor, Tensor | None]:
    """The mean of the (P, ...) losses of global views, and of local ones; None without any."""
    of_globals = [loss for loss, view in zip(losses, views, strict=True) if view < num_globals]
    of_locals = [loss for loss, view in zip(losses, views, strict=True) if view >= num_globals]
    return torch.stack(of_globals).mean(), torch.stack(of_locals).mean() if of_locals else None


def predict(logits: Tensor, targets: Tensor, wanted: Partners, *, temperature: float) -> Tensor:
    """Each view's batch mean of the cross-entropy with the mean of its partners' targets, (V,)."""
    with _full_precision(logits):
        losses: Tensor = _Prediction.apply(logits, targets, wanted, temperature)
    return losses


class _Prediction(torch.autograd.Function):
    """`predict`, whose gradient is (softmax - target) / (B T); forward keeps the bracket, backward scales it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, wanted: Partners, temperature: float) -> Tensor:
        losses = targets.new_empty(len(logits))
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        met: tuple[int, ...] = ()
        for v, view in enumerate(logits):
            if wanted[v] != met:
                met, target = wanted[v], _mean(targets, wanted[v])
            log_probs = F.log_softmax(view.float() / temperature, dim=-1)
            losses[v] = -torch.linalg.vecdot(target, log_probs).mean()  # einsum loses 2e-5 of 65,536 terms on a CPU
            if gradient is not None:
                torch.sub(log_probs.exp_(), target, out=gradient[v])
        ctx.save_for_backward(gradient)
        ctx.scale = 1 / (targets.shape[1] * temperature)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = (of_losses * ctx.scale).view(-1, 1, 1)
        return gradient.mul_(scale), None, None, None  # in place: torch refuses a second backward


def _mean(targets: Tensor, of: tuple[int, ...]) -> Tensor:
    """The mean of some views' targets, (B, K)."""
    first, *others = (targets[t] for t in of)
    if not others:
        return first
    total = first + others[0]
    for other in others[1:]:
        total += other
    return total.div_(len(of))


def weighted_prediction(logits: Tensor, targets: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """Weighted sum of the cross-entropies of rows: (M, K) logits with (M, K) targets, (M,) weights; 0 without rows."""
    with _full_precision(logits):
        loss: Tensor = _WeightedPrediction.apply(logits, targets, weights, temperature)
    return loss


class _WeightedPrediction(torch.autograd.Function):
    """`weighted_prediction`, whose gradient is w (softmax - target) / T, made some rows at a time."""

    ROWS = 1024

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> Tensor:
        loss = targets.new_zeros(())
        gradient = torch.empty_like(logits)
        for start in range(0, len(logits), _WeightedPrediction.ROWS):
            some = slice(start, start + _WeightedPrediction.ROWS)
            log_probs = F.log_softmax(logits[some].float() / temperature, dim=-1)
            loss -= torch.linalg.vecdot(targets[some], log_probs) @ weights[some]
            gradient[some] = log_probs.exp_().sub_(targets[some]).mul_(weights[some, None] / temperature)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(of_loss), None, None, None  # in place: torch refuses a second backward


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of finding each query's own key among the queue, one value a query; no gradient for keys and queue.

    queries: (V, B, D) unit rows;  keys: (B, D) unit rows;  queue: (D, Q) unit columns
    returns: (V, B)
    source: MoCo, arXiv 1911.05722, equation 1; the (V B, Q) logits never exist as a whole
    """
    with _full_precision(queries):
        losses: Tensor = _InfoNCE.apply(queries, keys.float(), queue, temperature)
    return losses


class _InfoNCE(torch.autograd.Function):
    """Each query's loss, (V, B); its gradient, p_own - 1 times the key and p_k times each negative, while p exists."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
        losses = keys.new_empty(queries.shape[:2])
        gradient = torch.empty_like(queries) if ctx.needs_input_grad[0] else None
        for v, view in enumerate(queries.float()):
            positive = torch.linalg.vecdot(view, keys) / temperature
            negatives = (view @ queue).div_(temperature)
            log_total = torch.logaddexp(positive, negatives.logsumexp(-1))
            losses[v] = log_total - positive
            if gradient is not None:
                pulls = torch.expm1(positive - log_total)[:, None] * keys
                pushes = negatives.sub_(log_total[:, None]).exp_() @ queue.T
                gradient[v] = (pulls + pushes) / temperature
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_losses[..., None], None, None, None


def mean_entropy(targets: Tensor) -> Tensor:
    """Mean entropy of the (G, B, K) targets' rows, in nats; holds one view's terms at a time."""
    return torch.stack([torch.special.entr(view).sum(-1).mean() for view in targets]).mean()


def _full_precision(tensor: Tensor) -> torch.autocast:
    """No autocast: a temperature of 0.04 would turn bfloat16's third digit into a loss of its own."""
    return torch.autocast(tensor.device.type, enabled=False)
