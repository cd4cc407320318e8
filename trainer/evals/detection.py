"""Detection and segmentation on COCO: how well a network transfers to finding things, trained whole."""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainer import distributed
from trainer.data.order import epoch_order
from trainer.engine import build_engine, plain_config
from trainer.evals.coco import CocoImages, as_results, average_precision
from trainer.evals.resumable import Resumable, eta
from trainer.evals.sources import Results, Source
from trainer.models.backbones import synchronise_batchnorm
from trainer.models.detectors import DetectionObjective, build_detector
from trainer.protocols import Detection
from trainer.recipe import RecipeError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoData:
    """What a detector trains on and is judged by."""

    train: CocoImages
    val: CocoImages


def open_coco(train: Path, val: Path | None, *, masks: bool) -> CocoData:
    """raises: RecipeError if a file is missing, or the two name different categories"""
    if val is None:
        raise RecipeError("detection needs val images; give data.val=.../annotations/instances_val2017.json")
    data = CocoData(CocoImages(train, train=True, masks=masks), CocoImages(val, train=False, masks=masks))
    if data.train.categories != data.val.categories:
        raise RecipeError(f"{train} and {val} name different categories; take both from one data set")
    return data


def run(source: Source, protocol: str) -> tuple[dict[str, Any], Results]:
    """A detector, or for `segmentation` one with masks, on every network of the source; seeds are the recipe's."""
    recipe, settings = source.recipe, source.recipe.evals.detection
    data = open_coco(recipe.data.train, recipe.data.val, masks=protocol == "segmentation")
    views, seed = recipe.views, recipe.seed
    results = {
        name: detection_accuracy(
            copy.deepcopy(network), data, settings, seed=seed, mean=views.mean, std=views.std,
            kept=source.resumable(name, seed),
        )
        for name, network in source.networks.items()
    }  # fmt: skip
    return dataclasses.asdict(settings), results


def detection_accuracy(
    network: nn.Module, data: CocoData, settings: Detection, *, seed: int, mean: Any, std: Any, kept: Resumable
) -> dict[str, float]:
    """Train a detector on the network, from its weights, and measure it."""
    device = distributed.local_device()
    torch.manual_seed(seed)
    try:
        detector = build_detector(
            network,
            num_classes=len(data.train.categories),
            masks=data.train.masks,
            train_sizes=settings.train_sizes,
            test_size=settings.test_size,
            max_size=settings.max_size,
            mean=mean,
            std=std,
        )
    except ValueError as error:
        raise RecipeError(f"detection: {error}") from error
    objective = DetectionObjective(detector).to(device)
    synchronise_batchnorm(objective, device)
    train(objective, data.train, settings, device, seed=seed, kept=kept)
    return evaluate(objective, data.val, device, num_workers=settings.num_workers)


def learning_rate(settings: Detection, step: int) -> float:
    """Linear warm-up from a thousandth, then a tenth after each of two milestones.

    source: detectron2's defaults, 1x schedule: 60,000 and 80,000 of 90,000 steps
    """
    warm = min(1.0, 0.001 + 0.999 * step / settings.warmup_steps) if settings.warmup_steps else 1.0
    passed = sum(step >= fraction * settings.steps for fraction in (2 / 3, 8 / 9))
    return settings.base_lr * settings.global_batch / 16 * warm * 0.1**passed


def train(
    objective: DetectionObjective,
    data: CocoImages,
    settings: Detection,
    device: torch.device,
    *,
    seed: int,
    kept: Resumable,
) -> None:
    """SGD over the whole detector, its BatchNorm included."""
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=settings.weight_decay)
    if settings.global_batch % distributed.world():
        raise RecipeError(
            f"evals.detection.global_batch {settings.global_batch} must divide over {distributed.world()} ranks"
        )
    share = settings.global_batch // distributed.world()
    engine = build_engine(objective.train(), optimizer, plain_config(share))
    first, _ = kept.restore(objective, optimizer)
    batches = endless(data, share, seed=seed, start=first, num_workers=settings.num_workers)
    clock = eta(first, settings.steps)
    for step in range(first, settings.steps):
        images, targets = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        loss, parts = engine([image.to(device) for image in images], [_to(target, device) for target in targets])
        engine.backward(loss)
        engine.step()
        if (step + 1) % settings.log_every_steps == 0:
            said = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
            log.info("detection step %d/%d  loss %.3f (%s)  ETA %s", step + 1, settings.steps, loss, said, clock(step))
        if (step + 1) % settings.log_every_steps == 0 or step + 1 == settings.steps:
            kept.save(step + 1, [])


def endless(
    data: CocoImages, share: int, *, seed: int, start: int, num_workers: int
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """This rank's images of every step from `start` on; the order is a function of the seed and the epoch."""
    batch = share * distributed.world()
    steps_per_epoch = len(data) // batch
    if steps_per_epoch == 0:
        raise RecipeError(f"{data.annotations}: {len(data)} images are less than a batch of {batch}")
    epoch, done = divmod(start, steps_per_epoch)
    while True:
        order = epoch_order(len(data), seed=seed, epoch=epoch)[: steps_per_epoch * batch].reshape(-1, batch)
        mine = order[done:, distributed.rank() * share : (distributed.rank() + 1) * share]
        generator = torch.Generator().manual_seed(hash((seed, epoch, distributed.rank())) % 2**63)
        yield from DataLoader(
            data, batch_sampler=mine.tolist(), num_workers=num_workers, collate_fn=_together, generator=generator
        )
        epoch, done = epoch + 1, 0


@torch.no_grad()
def evaluate(
    objective: DetectionObjective, data: CocoImages, device: torch.device, *, num_workers: int
) -> dict[str, float]:
    """Average precision over all images, each seen by one rank."""
    mine = range(distributed.rank(), len(data), distributed.world())
    loader = DataLoader(data, sampler=mine, batch_size=1, num_workers=num_workers, collate_fn=_together)
    results = []
    for (image,), (target,) in loader:
        (found,) = objective.detect([image.to(device)])
        results += as_results(data, int(target["image_id"]), {key: value.cpu() for key, value in found.items()})
    kinds = ("bbox", "segm") if data.masks else ("bbox",)
    everything = [each for of_rank in distributed.gather_objects(results) for each in of_rank]
    return average_precision(data, everything, kinds) | {"num_images": len(data)}


def _together(batch: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _to(target: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in target.items()}
