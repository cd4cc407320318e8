"""Low-shot accuracy: logistic regression on the features of 1, 2 or 5 images of each class."""

import dataclasses
import statistics
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import distributed
from trainer.evals.classifier import ClassTokens
from trainer.evals.features import Features, reader_of
from trainer.evals.knn import labelled_features
from trainer.evals.linear import fit_logistic, percent_right
from trainer.evals.sources import Results, Source
from trainer.protocols import LowShot
from trainer.recipe import RecipeError


def run(source: Source) -> tuple[dict[str, Any], Results]:
    """Low-shot accuracy of every network of the source."""
    recipe, settings = source.recipe, source.recipe.evals.lowshot
    reader = reader_of(recipe, distributed.local_device())
    networks = {name: _with_raw_token(network) for name, network in source.on(reader.device).items()}
    train, val = labelled_features(networks, recipe.data, reader)
    results = {name: lowshot_accuracy(train[name], val[name], settings, seed=recipe.seed) for name in source.networks}
    stated = dataclasses.asdict(settings) | {"features": "each less its mean, of length 1; of ViTs before the norm"}
    return stated | reader.stated(), results


def lowshot_accuracy(train: Features, val: Features, settings: LowShot, *, seed: int) -> dict[str, float]:
    """top1_N and its standard deviation over splits, in percent, for each number N of images a class.

    The classifier has no bias.
    """
    train, val = (dataclasses.replace(each, vectors=preprocess(each.vectors)) for each in (train, val))
    result: dict[str, float] = {}
    for count in settings.images_per_class:
        scores = [_split_accuracy(train, val, count, settings, seed=seed + i) for i in range(settings.splits)]
        result[f"top1_{count}"] = statistics.mean(scores)
        result[f"top1_{count}_std"] = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return result | {"num_images": len(val.labels)}


def _split_accuracy(train: Features, val: Features, count: int, settings: LowShot, *, seed: int) -> float:
    few = few_of_each_class(train.labels, count, seed=seed)
    num_classes = int(max(train.labels.max(), val.labels.max())) + 1
    decay = settings.penalty / len(few)
    weight, _ = fit_logistic(
        train.vectors[few], train.labels[few], num_classes=num_classes, weight_decay=decay, bias=False
    )
    return percent_right(val.vectors, val.labels, weight, None)[0]


def preprocess(vectors: Tensor) -> Tensor:
    """(N, D) -> (N, D): each row less its own mean, then of unit length.

    source: MSN, logistic_eval.py: cyanure's preprocess with centering, which goes by rows (measured, cyanure 1.2.2)
    """
    return F.normalize(vectors - vectors.mean(1, keepdim=True), dim=1)


def _with_raw_token(network: nn.Module) -> nn.Module:
    """A ViT gives its class token before the final norm, as MSN reads it; others give their features."""
    return ClassTokens(network, num_blocks=1, norm=False) if isinstance(network, VisionTransformer) else network


def few_of_each_class(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Rows of `count` images of every class, a pure function of the seed.

    raises: RecipeError for a class with fewer images
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    chosen = []
    for label in sorted(set(labels.tolist())):
        rows = order[labels[order] == label][:count]
        if len(rows) < count:
            raise RecipeError(
                f"evals.lowshot.images_per_class: class {label} has {len(rows)} train images, wanted {count}"
            )
        chosen.append(rows)
    return torch.cat(chosen)
