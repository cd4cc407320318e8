"""Logistic regression on cached features: a linear probe in seconds, beside the published protocols that take hours."""

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.evals.features import Features

WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Tried on the held-out tenth of the train images; a grid as in Caron et al., arXiv 2104.14294, for their ViTs."""
HELD_OUT = 10
"""Every tenth train image, after a fixed shuffle, chooses the weight decay; the val images choose nothing."""
MAX_ITERATIONS = 200


def fit_logistic(vectors: Tensor, labels: Tensor, *, num_classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    """The minimum of mean cross-entropy + weight_decay / 2 |W|^2, by full-batch L-BFGS.

    vectors: (N, D);  labels: (N,) in [0, C)
    returns: weight (C, D), bias (C,)
    equals: scikit-learn's LogisticRegression with C = 1 / (N weight_decay)
    """
    weight = torch.zeros(num_classes, vectors.shape[1], device=vectors.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=vectors.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(vectors, weight, bias), labels) + weight_decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def linear_accuracy(train: Features, val: Features) -> dict[str, float]:
    """Top-1 and top-5 in percent of a linear classifier on standardised features, and the weight decay it chose.

    Every rank has all features and computes the same.
    """
    num_classes = int(max(train.labels.max(), val.labels.max())) + 1
    std, mean = torch.std_mean(train.vectors, dim=0)
    vectors, queries = ((features.vectors - mean) / std.clamp_min(1e-6) for features in (train, val))
    shuffled = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0)).to(vectors.device)
    held_out, rest = shuffled[::HELD_OUT], shuffled[torch.arange(len(shuffled)) % HELD_OUT > 0]

    def held_out_accuracy(weight_decay: float) -> float:
        fitted = fit_logistic(vectors[rest], train.labels[rest], num_classes=num_classes, weight_decay=weight_decay)
        return _hits(vectors[held_out], train.labels[held_out], *fitted)[0]

    chosen = max(reversed(WEIGHT_DECAYS), key=held_out_accuracy)  # of equals, the strongest
    weight, bias = fit_logistic(vectors, train.labels, num_classes=num_classes, weight_decay=chosen)
    top1, top5 = _hits(queries, val.labels, weight, bias)
    return {"top1": top1, "top5": top5, "num_images": len(val.labels), "weight_decay": chosen}


def _hits(vectors: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> tuple[float, float]:
    logits = F.linear(vectors, weight, bias)
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return float(hits[:, 0].float().mean()) * 100, float(hits.any(1).float().mean()) * 100
