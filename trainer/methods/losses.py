"""The objectives as pure functions of logits, targets and the two SSLight weights.

Legend: B images, V views of which G global and L local, K prototypes, Q queue length, D embed_dim.

K and Q reach 65,536, so that (V, B, K) logits take hundreds of MB. Both objectives therefore go through the views one
by one and make the gradient where the softmax already is: beside the logits and their gradient they hold (B, K) only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


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


def swapped_prediction(logits: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every view with the targets of the other global views: DINO's and SwAV's loss.

    logits: (V, B, K), the globals first;  targets: (G, B, K) float32, each row summing to 1
    returns: mean over the G (G - 1) global pairs, and over the G L global-local pairs (None without locals)
    equals: mean over pairs (i, v), v != i, of -(targets_i . log_softmax(logits_v / T)); the targets are summed first,
    so that each view meets one log-softmax
    """
    num_globals = len(targets)
    if num_globals < 2:
        raise ValueError(f"swapped prediction needs at least 2 global views, got {num_globals}")
    with _full_precision(logits):
        losses: Tensor = _SwappedPrediction.apply(logits, targets, temperature)
    return losses[:num_globals].mean(), losses[num_globals:].mean() if len(logits) > num_globals else None


class _SwappedPrediction(torch.autograd.Function):
    """Each view's batch mean of the cross-entropy with the mean target of the other global views, (V,).

    Its gradient is (softmax - target) / (B T); forward keeps the bracket, backward scales it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        num_globals, batch = targets.shape[:2]
        losses = targets.new_empty(len(logits))
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = targets.sum(0)
        for v, view in enumerate(logits):
            wanted = (total - targets[v]).div_(num_globals - 1) if v < num_globals else total / num_globals
            log_probs = F.log_softmax(view.float() / temperature, dim=-1)
            losses[v] = -torch.linalg.vecdot(wanted, log_probs).mean()  # einsum loses 2e-5 of 65,536 terms on a CPU
            if gradient is not None:
                torch.sub(log_probs.exp_(), wanted, out=gradient[v])
        ctx.save_for_backward(gradient)
        ctx.scale = 1 / (batch * temperature)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = (of_losses * ctx.scale).view(-1, 1, 1)
        return gradient.mul_(scale), None, None  # in place: torch refuses a second backward


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
