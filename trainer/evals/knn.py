"""Weighted k-nearest-neighbour accuracy: val images vote among train images, without any training."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import distributed
from trainer.data.subset import read_subset
from trainer.evals.collapse import feature_std, rank_me
from trainer.evals.features import Features, ImageReader, reader_of
from trainer.evals.labels import count_classes
from trainer.evals.sources import Results, Source
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMATeacher
from trainer.models.gating import InMode, is_gated
from trainer.protocols import KNN
from trainer.recipe import Data, Recipe, RecipeError


@torch.no_grad()
def knn_votes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Each class's votes for each query: its k most similar bank rows vote with exp(cosine / temperature).

    bank: (N, D);  bank_labels: (N,) in [0, C);  queries: (Q, D); rows need not be of unit length
    returns: (Q, C) float32, scaled so that the nearest neighbour's vote is 1
    source: Wu et al., arXiv 1805.01978, section 3.4
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in [1, {len(bank)} bank images], got {k}")
    bank = F.normalize(bank, dim=1)
    votes = []
    for chunk in torch.split(F.normalize(queries, dim=1), 256):  # 256 x 1.28 M similarities take 1.3 GB
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(weights.new_zeros(len(chunk), num_classes).scatter_add_(1, bank_labels[nearest], weights))
    return torch.cat(votes)


def knn_accuracy(train: Features, val: Features, *, k: int, temperature: float) -> dict[str, float]:
    """Top-1 and top-5 in percent, and of how many images; each rank judges its slice of the queries, each once."""
    num_classes = int(max(train.labels.max(), val.labels.max())) + 1
    mine = slice(distributed.rank(), None, distributed.world())
    correct = torch.zeros(2, dtype=torch.float64, device=val.vectors.device)
    if len(val.labels[mine]):
        votes = knn_votes(
            train.vectors, train.labels, val.vectors[mine], k=k, temperature=temperature, num_classes=num_classes
        )
        hits = votes.topk(min(5, num_classes), dim=1).indices == val.labels[mine, None]
        correct += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
    top1, top5 = (distributed.sum_over_ranks(correct) / len(val.labels) * 100).tolist()
    return {"top1": top1, "top5": top5, "num_images": len(val.labels)}


def labelled_features(
    networks: dict[str, nn.Module], data: Data, reader: ImageReader
) -> tuple[dict[str, Features], dict[str, Features]]:
    """Each network's features of the train images (of the subset) and of the val images.

    raises: RecipeError if there are no val images, or images without a label
    """
    count_classes(data)
    assert data.val is not None
    train = reader.features(networks, data.train, read_subset(data.train, data.subset))
    return train, reader.features(networks, data.val)


def evaluate(
    networks: dict[str, nn.Module], data: Data, settings: KNN, reader: ImageReader
) -> dict[str, dict[str, float]]:
    """k-NN accuracy and collapse measures of each network, with the train images (of the subset) as the bank.

    raises: RecipeError if there are no val images, or images without a label
    """
    banks, queries = labelled_features(networks, data, reader)
    num_images = min(len(bank.labels) for bank in banks.values())
    if settings.k > num_images:
        raise RecipeError(f"evals.knn.k is {settings.k}, and there are {num_images} train images; lower it")
    return {
        name: knn_accuracy(banks[name], queries[name], k=settings.k, temperature=settings.temperature)
        | {"rank_me": rank_me(queries[name].vectors), "feature_std": feature_std(queries[name].vectors)}
        for name in networks
    }


def run(source: Source) -> tuple[dict[str, Any], Results]:
    """k-NN of every network of the source, and its settings."""
    recipe = source.recipe
    reader = reader_of(recipe, distributed.local_device())
    settings = {key: getattr(recipe.evals.knn, key) for key in ("k", "temperature")} | reader.stated()
    return settings, evaluate(source.on(reader.device), recipe.data, recipe.evals.knn, reader)


def evaluate_branches(
    recipe: Recipe, method: Method, teacher: EMATeacher | None, device: torch.device
) -> dict[str, float]:
    """Student's and teacher's k-NN during training, under the names of metrics.jsonl."""
    networks: dict[str, nn.Module] = {"student": method.student.backbone}
    if is_gated(method.student.backbone):
        networks["gated"] = InMode(method.student.backbone, "hard")
    if teacher is not None:
        networks["teacher"] = teacher.branch.backbone
    results = evaluate(networks, recipe.data, recipe.evals.knn, reader_of(recipe, device))
    return {f"knn/{name}_{key}": value for name, result in results.items() for key, value in result.items()}
