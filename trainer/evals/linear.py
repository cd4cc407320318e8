"""Logistic regression on cached features: a linear probe in seconds, beside the published protocols that take hours."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer import distributed
from trainer.evals.features import Features, reader_of
from trainer.evals.knn import labelled_features
from trainer.evals.sources import Results, Source

WEIGHT_DECAYS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
"""Tried in this order; a grid as in Caron et al., arXiv 2104.14294, for their ViTs."""
PATIENCE = 2
"""Weaker decays are not tried once so many in a row were no better: they take longest and overfit most."""
FOLDS = 5
"""Every train image is judged once by a classifier that has not seen it; the val images choose nothing."""
MAX_ITERATIONS = 200
TOLERANCE, TOLERANCE_OF_FOLDS = 1e-6, 3e-4
"""Largest entry of the gradient at which a fit ends; a choice needs less than the fit that is reported."""
Fitted = tuple[Tensor, Tensor]
"""Weight (C, D) and offset (C,)."""


def fit_logistic(
    vectors: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    weight_decay: float,
    bias: bool = True,
    start: Fitted | None = None,
    tolerance: float = TOLERANCE,
) -> Fitted:
    """The minimum of mean cross-entropy + weight_decay / 2 |W|^2, by full-batch L-BFGS.

    vectors: (N, D);  labels: (N,) in [0, C)
    start: where to begin, such as the minimum of another weight decay; by default at 0
    returns: weight (C, D), offset (C,), which stays 0 without bias
    equals: scikit-learn's LogisticRegression with C = 1 / (N weight_decay)
    """
    device = vectors.device
    zeros = torch.zeros(num_classes, vectors.shape[1], device=device), torch.zeros(num_classes, device=device)
    weight, offset = (each.clone() for each in start or zeros)
    weight.requires_grad_()
    offset.requires_grad_(bias)
    solver = torch.optim.LBFGS(
        [weight, offset] if bias else [weight], max_iter=MAX_ITERATIONS, history_size=20,
        tolerance_grad=tolerance, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(vectors, weight, offset), labels) + weight_decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), offset.detach()


def linear_accuracy(train: Features, val: Features) -> dict[str, float]:
    """Top-1 and top-5 in percent of a linear classifier on centred features, and what it chose.

    Its weight decay, and whether each feature is brought to a variance of 1 or all are scaled alike (one_scale), so
    that those that vary most count most. Every rank has all features and computes the same.
    """
    num_classes = int(max(train.labels.max(), val.labels.max())) + 1
    std, mean = torch.std_mean(train.vectors, dim=0)
    scales = (std.clamp_min(1e-6), std.square().mean().sqrt().clamp_min(1e-6))

    def scaled(features: Features, one_scale: int) -> Tensor:
        return (features.vectors - mean) / scales[one_scale]

    choices = {each: choose_decay(scaled(train, each), train.labels, num_classes=num_classes) for each in (1, 0)}
    one_scale = max(choices, key=lambda each: choices[each][1])
    weight_decay = choices[one_scale][0]
    fitted = fit_logistic(scaled(train, one_scale), train.labels, num_classes=num_classes, weight_decay=weight_decay)
    top1, top5 = percent_right(scaled(val, one_scale), val.labels, *fitted)
    measures = {"top1": top1, "top5": top5, "num_images": len(val.labels)}
    return measures | {"weight_decay": weight_decay, "one_scale": one_scale}


def choose_decay(vectors: Tensor, labels: Tensor, *, num_classes: int) -> tuple[float, float]:
    """The weight decay that is right most often about images left out, of equals the strongest; and how often, in %.

    Each fold's fit starts where the one with the decay before ended, which is near.
    """
    parts = [(held.to(labels.device), rest.to(labels.device)) for held, rest in folds(len(labels), FOLDS)]
    fitted: list[Fitted | None] = [None] * FOLDS
    accuracy: dict[float, float] = {}
    for weight_decay in WEIGHT_DECAYS:
        num_right = 0
        for fold, (held, rest) in enumerate(parts):
            fitted[fold] = weight, offset = fit_logistic(
                vectors[rest], labels[rest], num_classes=num_classes, weight_decay=weight_decay, start=fitted[fold],
                tolerance=TOLERANCE_OF_FOLDS,
            )  # fmt: skip
            num_right += int((F.linear(vectors[held], weight, offset).argmax(1) == labels[held]).sum())
        accuracy[weight_decay] = 100 * num_right / len(labels)
        best = max(accuracy, key=lambda each: accuracy[each])
        if WEIGHT_DECAYS.index(weight_decay) - WEIGHT_DECAYS.index(best) == PATIENCE:
            break
    return best, accuracy[best]


def folds(num_images: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Rows that are held out and rows that are not, so that each is held out once; always the same."""
    shuffled = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    fold = torch.arange(num_images) % count
    return [(shuffled[fold == each], shuffled[fold != each]) for each in range(count)]


def run(source: Source) -> tuple[dict[str, Any], Results]:
    """A linear classifier on cached features of every network of the source; images are read as k-NN reads them."""
    reader = reader_of(source.recipe, distributed.local_device())
    train, val = labelled_features(source.on(reader.device), source.recipe.data, reader)
    settings = reader.stated() | {"solver": "L-BFGS", "weight_decays": WEIGHT_DECAYS}
    settings |= {"scales": "each feature or all alike"}
    settings |= {"chosen_on": f"{FOLDS}-fold cross-validation on train"}
    return settings, {name: linear_accuracy(train[name], val[name]) for name in source.networks}


def percent_right(vectors: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[float, float]:
    """Top-1 and top-5 of a linear classifier."""
    logits = F.linear(vectors, weight, bias)
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return float(hits[:, 0].float().mean()) * 100, float(hits.any(1).float().mean()) * 100
