"""The objectives as pure functions of logits, targets and the two SSLight weights.

Legend: B images, G global and L local views, K prototypes, Q queue length, D embed_dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def weigh(global_loss: Tensor, local_loss: Tensor | None, *, global_weight: float, local_weight: float) -> Tensor:
    """global_weight x (mean over global pairs) + local_weight x (mean over global-local pairs).

    source: SSLight, arXiv 2210.02808, section 3.3.4; (1/7, 6/7) is the plain mean for 2 + 6 views
    """
    if local_loss is None:
        return global_weight * global_loss
    return global_weight * global_loss + local_weight * local_loss


def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, *, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every student view against the teacher's view of another crop.

    student: (V, B, K) logits, the V = G + L views with the globals first;  teacher: (G, B, K) logits;  center: (K,)
    returns: mean over the G (G - 1) global pairs, and over the G L global-local pairs (None without locals)
    equals: mean over pairs (i, v), v != i, of -(softmax((t_i - c) / T_t) . log_softmax(s_v / T_s)); the targets are
    summed first, so that each student view meets one log-softmax
    """
    num_globals = len(teacher)
    if num_globals < 2:
        raise ValueError(f"DINO needs at least 2 global views, got {num_globals}")
    targets = F.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    log_probs = F.log_softmax(student.float() / student_temp, dim=-1)
    of_others = (targets.sum(0, keepdim=True) - targets) / (num_globals - 1)
    with _full_precision(student):
        global_loss = -torch.einsum("vbk,vbk->vb", of_others, log_probs[:num_globals]).mean()
        if len(student) == num_globals:
            return global_loss, None
        local_loss = -torch.einsum("bk,vbk->vb", targets.mean(0), log_probs[num_globals:]).mean()
    return global_loss, local_loss


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of finding each query's own key among the queue, one value a query.

    queries: (V, B, D) unit rows;  keys: (B, D) unit rows;  queue: (D, Q) unit columns
    returns: (V, B)
    source: MoCo, arXiv 1911.05722, equation 1; the positive never joins the (V B, Q) logits in one tensor
    """
    with _full_precision(queries):
        positive = torch.einsum("vbd,bd->vb", queries.float(), keys.float()) / temperature
        negatives = (queries.float() @ queue / temperature).logsumexp(-1)
        return torch.logaddexp(positive, negatives) - positive


def _full_precision(tensor: Tensor) -> torch.autocast:
    """No autocast: a temperature of 0.04 would turn bfloat16's third digit into a loss of its own."""
    return torch.autocast(tensor.device.type, enabled=False)
