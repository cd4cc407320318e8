"""Logistic regression on cached features: a linear probe in seconds, beside the published protocols that take hours."""

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer import distributed
from trainer.evals.features import Features, reader_of
from trainer.evals.knn import labelled_features
from trainer.evals.sources import Results, Source

WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Tried on the held-out tenth of the train images; a grid as in Caron et al., arXiv 2104.14294, for their ViTs."""
HELD_OUT = 10
"""Every tenth train image, after a fixed shuffle, chooses the weight decay; the val images choose nothing."""
MAX_ITERATIONS = 200


def fit_logistic(
    vectors: Tensor, labels: Tensor, *, num_classes: int, weight_decay: float, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """The minimum of mean cross-entropy + weight_decay / 2 |W|^2, by full-batch L-BFGS.

    vectors: (N, D);  labels: (N,) in [0, C)
    returns: weight (C, D), offset (C,), which stays 0 without bias
    equals: scikit-learn's LogisticRegression with C = 1 / (N weight_decay)
    """
    weight = torch.zeros(num_classes, vectors.shape[1], device=vectors.device, requires_grad=True)
    offset = torch.zeros(num_classes, device=vectors.device, requires_grad=bias)
    solver = torch.optim.LBFGS(
        [weight, offset] if bias else [weight], max_iter=MAX_ITERATIONS, history_size=20, tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
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
    held_out, rest = (rows.to(train.labels.device) for rows in held_out_tenth(len(train.labels)))

    def fitted(rows: Tensor | slice, choice: tuple[int, float]) -> tuple[Tensor, Tensor]:
        one_scale, weight_decay = choice
        vectors = (train.vectors[rows] - mean) / scales[one_scale]
        return fit_logistic(vectors, train.labels[rows], num_classes=num_classes, weight_decay=weight_decay)

    def held_out_accuracy(choice: tuple[int, float]) -> float:
        vectors = (train.vectors[held_out] - mean) / scales[choice[0]]
        return percent_right(vectors, train.labels[held_out], *fitted(rest, choice))[0]

    chosen = max(product((1, 0), reversed(WEIGHT_DECAYS)), key=held_out_accuracy)  # of equals, the strongest
    top1, top5 = percent_right((val.vectors - mean) / scales[chosen[0]], val.labels, *fitted(slice(None), chosen))
    measures = {"top1": top1, "top5": top5, "num_images": len(val.labels)}
    return measures | {"weight_decay": chosen[1], "one_scale": chosen[0]}


def held_out_tenth(num_images: int) -> tuple[Tensor, Tensor]:
    """Rows of the train images that choose, and of those that are trained on meanwhile; always the same."""
    shuffled = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    return shuffled[::HELD_OUT], shuffled[torch.arange(num_images) % HELD_OUT > 0]


def run(source: Source) -> tuple[dict[str, Any], Results]:
    """A linear classifier on cached features of every network of the source; images are read as k-NN reads them."""
    reader = reader_of(source.recipe, distributed.local_device())
    train, val = labelled_features(source.on(reader.device), source.recipe.data, reader)
    settings = {"size": reader.size, "resize": reader.resize, "solver": "L-BFGS", "weight_decays": WEIGHT_DECAYS}
    settings |= {"scales": "each feature or all alike"}
    settings |= {"chosen_on": f"1/{HELD_OUT} of train"}
    return settings, {name: linear_accuracy(train[name], val[name]) for name in source.networks}


def percent_right(vectors: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[float, float]:
    """Top-1 and top-5 of a linear classifier."""
    logits = F.linear(vectors, weight, bias)
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return float(hits[:, 0].float().mean()) * 100, float(hits.any(1).float().mean()) * 100
