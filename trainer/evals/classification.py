"""The protocols that train a classifier on images: linear probe, few labels, transfer, fine-tuning."""

import copy
import dataclasses
import logging
import math
import statistics
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from trainer import distributed, weights
from trainer.data.loader import ViewLoader
from trainer.data.photometric import to_float
from trainer.data.subset import read_subset
from trainer.data.views import CenterView, View
from trainer.engine import build_engine, plain_config
from trainer.evals.classifier import Classifier, build_classifier
from trainer.evals.features import ImageReader, reader_of
from trainer.evals.labels import count_classes
from trainer.evals.resumable import Resumable, eta
from trainer.evals.sources import Results, Source
from trainer.lars import LARS
from trainer.models.backbones import synchronise_batchnorm
from trainer.protocols import Classification
from trainer.recipe import Data, RecipeError

log = logging.getLogger(__name__)
WHOLE = {"scale": (1.0, 1.0), "ratio": (0.02, 50.0)}
"""No crop of all the area has another shape than the image, so the kernel falls back to the image itself."""


def run(source: Source, protocol: str) -> tuple[dict[str, Any], Results]:
    """Train and measure every network of the source, `repeats` times each."""
    recipe = source.recipe
    results: Results = {}
    settings: Classification = getattr(recipe.evals, protocol)
    if protocol == "linear" and any(isinstance(each, VisionTransformer) for each in source.networks.values()):
        settings = recipe.evals.linear_vit
    if protocol.startswith("semi") and recipe.data.subset is None:
        raise RecipeError(
            f"{protocol} trains on few labelled images: give data.subset=LIST, a text file with their names, such as "
            "SimCLR's 1percent.txt"
        )
    reader = reader_of(recipe, distributed.local_device())
    num_classes, stated = count_classes(recipe.data), dataclasses.asdict(settings) | reader.stated()
    for name, network in source.networks.items():
        folder = source.folders.get(name)
        projection = weights.load_head(folder) if folder and settings.head == "projection" else {}
        scores = []
        for seed in range(recipe.seed, recipe.seed + settings.repeats):
            classifier = build_classifier(
                copy.deepcopy(network), settings, num_classes, projection, seed=seed, bf16=reader.bf16
            )
            training = Training(recipe.data, settings, reader, seed, f"{protocol} of {name}")
            scores.append(training.run(classifier, source.resumable(name, seed, stated)))
        results[name] = mean_and_spread(scores)
    return stated, results


def mean_and_spread(scores: list[dict[str, float]]) -> dict[str, float]:
    """Of one network's trainings: the mean of each measure, and top1's standard deviation if there are several."""
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

    def run(self, classifier: Classifier, kept: Resumable) -> dict[str, float]:
        """Top-1 and top-5 on the val images, each counted once, after the last or the best epoch."""
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
            if settings.select == "best" or epoch + 1 == settings.epochs:
                scores.append(self._evaluate(classifier))
            kept.save(epoch + 1, scores)
            log.info("%s epoch %d/%d  loss %.4f  ETA %s", self.name, epoch + 1, settings.epochs, loss, clock(epoch))
        loader.close()
        return max(scores, key=lambda score: score["top1"])

    def _loader(self) -> ViewLoader:
        """Crops of the train images, flipped every second time, and nothing else."""
        world, settings, data = distributed.world(), self.settings, self.data
        if settings.global_batch % world:
            raise RecipeError(f"{self.name}: global_batch {settings.global_batch} must divide over {world} ranks")
        subset = read_subset(data.train, data.subset)
        return ViewLoader(
            data.train, [self._crop(flip_prob=0.5)], batch_size=settings.global_batch // world, seed=self.seed,
            rank=distributed.rank(), world=world, num_workers=data.num_workers, subset=subset,
            on_bad_image=data.on_bad_image,
        )  # fmt: skip

    def _crop(self, *, flip_prob: float) -> View:
        box: dict[str, Any] = WHOLE if self.settings.crop == "squash" else {"scale": self.settings.scale}
        plain: dict[str, Any] = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0, "solarize_prob": 0.0}
        return View(size=self.reader.size, flip_prob=flip_prob, **box, **plain)

    def _train_epoch(self, engine: Any, classifier: Classifier, loader: ViewLoader, epoch: int) -> float:
        """The mean loss of an epoch on this rank."""
        reader = self.reader
        classifier.train()
        losses: list[Tensor] = []
        for batch in loader.epoch(epoch):
            images = to_float(batch.views[0], reader.device, reader.mean, reader.std)
            loss = engine(images, batch.labels.to(reader.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def _evaluate(self, classifier: Classifier) -> dict[str, float]:
        """Top-1 and top-5 in percent of all val images, each counted once over all ranks."""
        assert self.data.val is not None
        reader = self.reader
        centre = CenterView(size=reader.size, resize=reader.resize)
        view = self._crop(flip_prob=0.0) if self.settings.crop == "squash" else centre
        loader = ViewLoader(
            self.data.val, [view], batch_size=reader.batch_size, rank=distributed.rank(), world=distributed.world(),
            num_workers=reader.num_workers, shuffle=False, drop_last=False,
        )  # fmt: skip
        classifier.eval()
        counts = torch.zeros(3, dtype=torch.float64, device=reader.device)
        for batch in loader.epoch(0):
            logits = classifier.logits(to_float(batch.views[0], reader.device, reader.mean, reader.std))
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels.to(reader.device)[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), torch.tensor(len(hits), device=reader.device)])
        loader.close()
        top1, top5, total = distributed.sum_over_ranks(counts).tolist()
        return {"top1": 100 * top1 / total, "top5": 100 * top5 / total, "num_images": int(total)}


def build_sgd(classifier: Classifier, settings: Classification) -> torch.optim.SGD | LARS:
    """SGD or LARS over what is trained; a head may learn faster than its network. LARS adapts no 1-D parameters."""
    parts: list[tuple[nn.Module, float]] = [(classifier.head, settings.head_lr_factor)]
    if classifier.trains_network:
        parts.insert(0, (classifier.network, 1.0))
    groups: list[dict[str, Any]] = [
        {"params": members, "factor": factor, "adapts": adapts, "weight_decay": settings.weight_decay}
        for part, factor in parts
        for adapts in (True, False)
        if (members := [p for p in part.parameters() if (p.ndim > 1) == adapts])
    ]
    if settings.optimizer == "lars":
        return LARS(groups, lr=0.0, momentum=0.9)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=settings.nesterov)


def set_rate(optimizer: torch.optim.Optimizer, settings: Classification, epoch: int) -> None:
    """This epoch's learning rate: by half a cosine, or a tenth after each milestone."""
    peak = settings.base_lr * settings.global_batch / 256
    rate = settings.final_lr + (peak - settings.final_lr) * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
    if settings.milestones:
        rate = peak * 0.1 ** sum(epoch >= milestone for milestone in settings.milestones)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
