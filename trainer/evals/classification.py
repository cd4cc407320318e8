"""The protocols that train a classifier on images: linear probe, few labels, transfer, fine-tuning."""

import copy
import dataclasses
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data_prep.schema import open_beton
from trainer import distributed, weights
from trainer.data.loader import ViewLoader
from trainer.data.photometric import to_float
from trainer.data.subset import read_subset
from trainer.data.views import CenterView, View
from trainer.engine import build_engine, plain_config
from trainer.evals.classifier import Classifier, build_classifier
from trainer.evals.features import ImageReader, reader_of
from trainer.evals.labels import count_classes
from trainer.evals.linear import folds
from trainer.evals.resumable import Resumable, eta
from trainer.evals.sources import Results, Source
from trainer.guards import TrainingError
from trainer.lars import LARS
from trainer.models.backbones import synchronise_batchnorm
from trainer.protocols import Classification, Evals, Linear, LinearViT
from trainer.recipe import Data, RecipeError

log = logging.getLogger(__name__)
WHOLE = {"scale": (1.0, 1.0), "ratio": (0.02, 50.0)}
"""No crop of all the area has another shape than the image, so the kernel falls back to the image itself."""
SWEEP = ("sweep", "rate")
"""Settings that a report states only with a sweep, so that one without compares with those that knew none."""
HELD_OUT = 10
"""Under `rate: held_out`, one of so many train images is kept from the heads that the rate is chosen by."""
Scores = dict[float, dict[str, float]]
"""base_lr -> measure -> value."""


def run(source: Source, protocol: str) -> tuple[dict[str, Any], Results]:
    """Train and measure every network of the source, `repeats` times each."""
    recipe = source.recipe
    results: Results = {}
    settings = settings_of(recipe.evals, protocol, list(source.networks.values()))
    if protocol.startswith("semi") and recipe.data.subset is None:
        raise RecipeError(
            f"{protocol} trains on few labelled images: give data.subset=LIST, a text file with their names, such as "
            "SimCLR's 1percent.txt"
        )
    reader = reader_of(recipe, distributed.local_device())
    num_classes, every = count_classes(recipe.data), dataclasses.asdict(settings) | reader.stated()
    for name, network in source.networks.items():
        folder = source.folders.get(name)
        projection, method = _projection_of(folder) if folder and settings.head == "projection" else ({}, None)
        scores: list[Scores] = []
        choosing: list[Scores] = []
        for seed in range(recipe.seed, recipe.seed + settings.repeats):
            training = Training(recipe.data, settings, reader, seed, f"{protocol} of {name}")
            for each in [training.held_out(), training] if settings.rate == "held_out" else [training]:
                classifier = build_classifier(
                    copy.deepcopy(network),
                    settings,
                    num_classes,
                    projection,
                    seed=seed,
                    method=method,
                    bf16=reader.bf16,
                )
                kept = source.resumable(name, seed, every, part="-rate" if each.split else "")
                (choosing if each.split else scores).append(each.run(classifier, kept))
        results[name] = summary(scores, settings, choosing or scores)
    return every if settings.sweep else {key: every[key] for key in every if key not in SWEEP}, results


def _projection_of(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of the projection head beside the weights, and the method that it is of."""
    spec = weights.spec_of_head(folder)
    return weights.load_head(folder), spec.method if spec else None


def settings_of(evals: Evals, protocol: str, networks: Sequence[nn.Module]) -> Classification:
    """The protocol's settings; of `linear` those for the kind of network.

    raises: RecipeError if those for the other kind were changed, which would change nothing
    """
    if protocol != "linear":
        settings: Classification = getattr(evals, protocol)
        return settings
    if any(isinstance(each, VisionTransformer) for each in networks):
        if evals.linear != Linear():
            raise RecipeError("evals.linear was changed, and vision transformers read evals.linear_vit; change that")
        return evals.linear_vit
    if evals.linear_vit != LinearViT():
        raise RecipeError("evals.linear_vit was changed, and this network reads evals.linear; change that")
    return evals.linear


def summary(scores: list[Scores], settings: Classification, choosing: list[Scores]) -> dict[str, float]:
    """Of one network's trainings: what the head of the rate that counts reached, and beside it each rate's top-1.

    choosing: on which images the rate is chosen, unless it is base_lr
    """
    by_rate = {rate: mean_and_spread([score[rate] for score in scores]) for rate in settings.rates}
    if not settings.sweep:
        return by_rate[settings.base_lr]
    judged = {rate: mean_and_spread([score[rate] for score in choosing])["top1"] for rate in settings.rates}
    rate = settings.base_lr if settings.rate == "base_lr" else max(judged, key=lambda each: judged[each])
    return by_rate[rate] | {"base_lr": rate} | {f"top1_at_{each}": by_rate[each]["top1"] for each in sorted(by_rate)}


def mean_and_spread(scores: list[dict[str, float]]) -> dict[str, float]:
    """Of several trainings: the mean of each measure, and top1's standard deviation if there are several."""
    result = {key: statistics.mean(score[key] for score in scores) for key in scores[0]}
    result["num_images"] = scores[0]["num_images"]
    if len(scores) > 1:
        result["top1_std"] = statistics.stdev(score["top1"] for score in scores)
    return result


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of a classifier, and what it depends on."""

    data: Data
    settings: Classification
    reader: ImageReader
    """How val images are read; train images are cut to the same size."""
    seed: int
    name: str
    split: tuple[list[int], list[int]] | None = None
    """Train images that it sees, and others that judge it in place of the val images; by default it sees them all."""

    def held_out(self) -> "Training":
        """The same without a tenth of the train images, always the same ones, which judge it."""
        every = self._images()
        judges, seen = (torch.tensor(every)[rows].tolist() for rows in folds(len(every), HELD_OUT)[0])
        return dataclasses.replace(self, split=(seen, judges), name=f"{self.name}, rates on held-out images,")

    def run(self, classifier: Classifier, kept: Resumable) -> Scores:
        """Top-1 and top-5 on the images that judge, each counted once, after the last epoch or each rate's best."""
        device, settings = self.reader.device, self.settings
        synchronise_batchnorm(classifier.to(device), device)
        loader = self._loader()
        optimizer = build_sgd(classifier, settings)
        engine = build_engine(classifier, optimizer, plain_config(loader.batch_size))
        first, scores = kept.restore(classifier, optimizer)
        clock = eta(first, settings.epochs)
        for epoch in range(first, settings.epochs):
            set_rate(optimizer, settings, epoch)
            loss = self._train_epoch(engine, classifier, loader, epoch)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"{self.name}: the loss of epoch {epoch + 1} is {loss}; nothing was kept of it. Lower its base_lr, "
                    f"{settings.base_lr} for 256 images"
                )
            if settings.select == "best" or epoch + 1 == settings.epochs:
                scores.append(self._evaluate(classifier))
            kept.save(epoch + 1, scores)
            log.info("%s epoch %d/%d  loss %.4f  ETA %s", self.name, epoch + 1, settings.epochs, loss, clock(epoch))
        loader.close()
        return {rate: max((score[rate] for score in scores), key=lambda each: each["top1"]) for rate in settings.rates}

    def _loader(self) -> ViewLoader:
        """Crops of the train images, flipped every second time, and nothing else."""
        world, settings, data = distributed.world(), self.settings, self.data
        if settings.global_batch % world:
            raise RecipeError(f"{self.name}: global_batch {settings.global_batch} must divide over {world} ranks")
        images = self._images()
        if len(images) < settings.global_batch:
            raise RecipeError(
                f"{self.name}: {len(images)} train images make no batch of {settings.global_batch}; lower global_batch "
                "in the protocol's settings"
            )
        return ViewLoader(
            data.train, [self._crop(flip_prob=0.5)], batch_size=settings.global_batch // world, seed=self.seed,
            rank=distributed.rank(), world=world, num_workers=data.num_workers, subset=images,
            on_bad_image=data.on_bad_image,
        )  # fmt: skip

    def _images(self) -> list[int]:
        """The train images that it sees."""
        if self.split:
            return self.split[0]
        subset = read_subset(self.data.train, self.data.subset)
        return list(range(open_beton(self.data.train).num_samples)) if subset is None else subset

    def _crop(self, *, flip_prob: float) -> View:
        box: dict[str, Any] = WHOLE if self.settings.crop == "squash" else {"scale": self.settings.scale}
        plain: dict[str, Any] = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0, "solarize_prob": 0.0}
        return View(size=self.reader.size, flip_prob=flip_prob, **box, **plain)

    def _train_epoch(self, engine: Any, classifier: Classifier, loader: ViewLoader, epoch: int) -> float:
        """The mean loss of an epoch over all ranks, of the head of base_lr."""
        reader = self.reader
        classifier.train()
        losses: list[Tensor] = []
        for batch in loader.epoch(epoch):
            images = to_float(batch.views[0], reader.device, reader.mean, reader.std)
            total, loss = engine(images, batch.labels.to(reader.device))
            engine.backward(total)
            engine.step()
            losses.append(loss)
        return float(distributed.mean_over_ranks(torch.stack(losses).mean()))

    @torch.no_grad()
    def _evaluate(self, classifier: Classifier) -> Scores:
        """Each head's top-1 and top-5 in percent of all images that judge, each counted once over all ranks."""
        assert self.data.val is not None
        beton, subset = (self.data.train, self.split[1]) if self.split else (self.data.val, None)
        reader = self.reader
        centre = CenterView(size=reader.size, resize=reader.resize)
        view = self._crop(flip_prob=0.0) if self.settings.crop == "squash" else centre
        loader = ViewLoader(
            beton, [view], batch_size=reader.batch_size, rank=distributed.rank(), world=distributed.world(),
            num_workers=reader.num_workers, shuffle=False, drop_last=False, subset=subset,
        )  # fmt: skip
        classifier.eval()
        counts = torch.zeros(len(self.settings.rates), 3, dtype=torch.float64, device=reader.device)
        for batch in loader.epoch(0):
            labels = batch.labels.to(reader.device)
            each = classifier.logits(to_float(batch.views[0], reader.device, reader.mean, reader.std))
            counts += torch.stack([count_hits(logits, labels) for logits in each])
        loader.close()
        return {
            rate: {"top1": 100 * top1 / total, "top5": 100 * top5 / total, "num_images": int(total)}
            for rate, (top1, top5, total) in zip(
                self.settings.rates, distributed.sum_over_ranks(counts).tolist(), strict=True
            )
        }


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C) logits -> (3,): how many labels come first, how many are among the first five, and B."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum(), torch.tensor(len(hits), device=hits.device)])


def build_sgd(classifier: Classifier, settings: Classification) -> torch.optim.SGD | LARS:
    """SGD or LARS over what is trained, each head in groups of its own, since each has a rate of its own.

    A head may learn faster than its network. LARS adapts no 1-D parameters.
    """
    heads = zip(classifier.heads, settings.rates, strict=True)
    parts: list[tuple[nn.Module, float, float]] = [(head, rate, settings.head_lr_factor) for head, rate in heads]
    if classifier.trains_network:
        parts.insert(0, (classifier.network, settings.base_lr, 1.0))
    shared = {"weight_decay": settings.weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": members, "base_lr": rate, "factor": factor, "adapts": adapts, **shared}
        for part, rate, factor in parts
        for adapts in (True, False)
        if (members := [p for p in part.parameters() if (p.ndim > 1) == adapts])
    ]
    if settings.optimizer == "lars":
        return LARS(groups, lr=0.0, momentum=0.9)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=settings.nesterov)


def set_rate(optimizer: torch.optim.Optimizer, settings: Classification, epoch: int) -> None:
    """This epoch's learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate_at(epoch, group["base_lr"], settings) * group["factor"]


def rate_at(epoch: int, base_lr: float, settings: Classification) -> float:
    """From base_lr by half a cosine, or a tenth after each milestone."""
    peak = base_lr * settings.global_batch / 256
    if settings.milestones:
        return peak * 0.1 ** sum(epoch >= milestone for milestone in settings.milestones)
    return settings.final_lr + (peak - settings.final_lr) * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
