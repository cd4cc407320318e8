"""Sinkhorn's algorithm: soft assignments of samples to prototypes, balanced over the samples of all ranks."""

import torch
from torch import Tensor

from trainer import distributed


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Assign samples to prototypes softly, each prototype getting an equal share; one collective an iteration.

    scores: (..., B, K) similarity of this rank's samples to every prototype, any float type; every rank has B samples
    returns: (..., B, K) float32 codes of this rank's samples, each row summing to 1
    source: SwAV, arXiv 2006.09882, appendix A.1; done in log space, so that exp() cannot overflow, and without its
    division by the total, which the first iteration undoes
    """
    log_codes = scores.float() / epsilon
    for _ in range(iterations):
        log_codes -= distributed.logsumexp_over_ranks(log_codes.logsumexp(-2, keepdim=True))
        log_codes -= log_codes.logsumexp(-1, keepdim=True)
    return log_codes.exp_()
