"""Detection and segmentation on COCO: how well a network transfers to finding things, trained whole."""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainer import distributed
from trainer.data.order import epoch_order
from trainer.engine import build_engine, plain_config
from trainer.evals.coco import CocoImages, Sample, as_results, average_precision
from trainer.evals.resumable import Resumable, eta
from trainer.evals.sources import Results, Source
from trainer.generators import seed_everything
from trainer.guards import TrainingError
from trainer.models.backbones import synchronise_batchnorm
from trainer.models.detectors import DetectionObjective, build_detector
from trainer.models.rcnn import KEY
from trainer.protocols import Detection
from trainer.recipe import RecipeError

log = logging.getLogger(__name__)
OF_THE_MACHINE = ("num_workers", "log_every_steps", "save_every_steps")
"""Settings that change no number, so that reports with different ones may be compared."""


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
    views, seed, bf16 = recipe.views, recipe.seed, recipe.evals.bf16
    stated = {key: value for key, value in dataclasses.asdict(settings).items() if key not in OF_THE_MACHINE}
    stated |= {"bf16": True} if bf16 else {}
    results = {
        name: detection_accuracy(
            copy.deepcopy(network), data, settings, seed=seed, mean=views.mean, std=views.std, bf16=bf16,
            kept=source.resumable(name, seed, stated),
        )
        for name, network in source.networks.items()
    }  # fmt: skip
    return stated, results


def detection_accuracy(
    network: nn.Module,
    data: CocoData,
    settings: Detection,
    *,
    seed: int,
    mean: Any,
    std: Any,
    bf16: bool,
    kept: Resumable,
) -> dict[str, float]:
    """Train a detector on the network, from its weights, and measure it."""
    device = distributed.local_device()
    seed_everything(seed)
    try:
        detector = build_detector(
            network,
            num_classes=len(data.train.categories),
            masks=data.train.masks,
            train_sizes=settings.train_sizes,
            test_size=settings.test_size,
            max_size=settings.max_size,
            regions=settings.regions,
            mean=mean,
            std=std,
            bf16=bf16,
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
    """SGD over the whole detector, its BatchNorm included.

    A step's draws depend on the seed and the step, and on the image, or (dropped paths) on the rank, so that a training
    that was stopped goes on equally.

    raises: RecipeError if a batch does not divide over the ranks, or holds more than the data; TrainingError if a loss
        is not finite
    """
    share = _share(data, settings)
    optimizer = torch.optim.SGD(parameter_groups(objective, settings.weight_decay), lr=0.0, momentum=0.9)
    engine = build_engine(objective.train(), optimizer, plain_config(share))
    first, _ = kept.restore(objective, optimizer)
    batches = DataLoader(
        data,
        batch_sampler=batches_of_rank(
            len(data), share, distributed.rank(), distributed.world(), seed=seed, steps=range(first, settings.steps)
        ),
        num_workers=settings.num_workers,
        collate_fn=_together,
    )
    clock = eta(first, settings.steps)
    for step, (images, targets) in enumerate(batches, first):
        seed_everything(seed, distributed.rank(), step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        keyed = [_to(target, device) | {KEY: _key(seed, step, target)} for target in targets]
        loss, parts = engine([image.to(device) for image in images], keyed)
        engine.backward(loss)
        engine.step()
        said = _said(loss, parts, step)
        if (step + 1) % settings.log_every_steps == 0:
            log.info("detection step %d/%d  %s  ETA %s", step + 1, settings.steps, said, clock(step))
        if (step + 1) % settings.save_every_steps == 0 or step + 1 == settings.steps:
            kept.save(step + 1, [])


def _share(data: CocoImages, settings: Detection) -> int:
    """How many images a rank sees in a step."""
    batch, world = settings.global_batch, distributed.world()
    if batch % world:
        raise RecipeError(f"evals.detection.global_batch {batch} must divide over {world} ranks; set it to a multiple")
    if batch > len(data):
        raise RecipeError(
            f"{data.annotations}: {len(data)} images with objects are less than a batch; set "
            f"evals.detection.global_batch below {batch}"
        )
    return batch // world


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """detectron2's: everything decays but norms."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    kept = [each for inner in module.modules() if isinstance(inner, norms) for each in inner.parameters()]
    spared = {id(parameter) for parameter in kept}
    decayed = [parameter for parameter in module.parameters() if id(parameter) not in spared]
    groups = {weight_decay: decayed, 0.0: kept} if weight_decay else {0.0: decayed + kept}
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items() if params]


def _said(loss: Tensor, parts: dict[str, Tensor], step: int) -> str:
    """The losses, as means over the ranks."""
    means = distributed.mean_over_ranks(torch.stack([loss.detach(), *parts.values()]))
    said = ", ".join(f"{name} {value:.3f}" for name, value in zip(["loss", *parts], means.tolist(), strict=True))
    if not means.isfinite().all():
        raise TrainingError(
            f"detection step {step + 1}: {said}; nothing was kept of it. Lower evals.detection.base_lr, or lengthen "
            "evals.detection.warmup_steps"
        )
    return said


def batches_of_rank(
    num_images: int, share: int, rank: int, world: int, *, seed: int, steps: range
) -> Iterator[list[tuple[int, bool]]]:
    """A rank's images in each of the steps, and which are mirrored: functions of the seed and the epoch.

    share: images of a rank in a step; an epoch's last images, fewer than a batch, wait for another epoch
    """
    batch = share * world
    steps_per_epoch = num_images // batch
    for step in steps:
        epoch, done = divmod(step, steps_per_epoch)
        if done == 0 or step == steps.start:
            order, mirrored = epoch_order(num_images, seed=seed, epoch=epoch), _mirrored(num_images, seed, epoch)
        begin = done * batch + rank * share
        yield [(int(image), bool(mirrored[image])) for image in order[begin : begin + share]]


def _mirrored(num_images: int, seed: int, epoch: int) -> NDArray[np.bool_]:
    """Half of the images, another half in every epoch; from a counter that the order does not use."""
    key, counter = np.array([seed, epoch], dtype=np.uint64), np.array([0, 0, 0, 1], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(num_images)
    return np.asarray(words >> np.uint64(63) == 1)


def evaluate(
    objective: DetectionObjective, data: CocoImages, device: torch.device, *, num_workers: int
) -> dict[str, float]:
    """Average precision over all images, each seen by one rank."""
    objective.eval()
    mine = [[(index, False)] for index in range(distributed.rank(), len(data), distributed.world())]
    results, seen = [], []
    for images, targets in DataLoader(data, batch_sampler=mine, num_workers=num_workers, collate_fn=_together):
        (found,) = objective.detect([image.to(device) for image in images])
        seen.append(int(targets[0]["image_id"]))
        results += as_results(data, seen[-1], {key: value.cpu() for key, value in found.items()})
    kinds = ("bbox", "segm") if data.masks else ("bbox",)
    every = distributed.gather_objects((seen, results))
    images_seen = sorted(image for of_rank, _ in every for image in of_rank)
    assert images_seen == data.ids, "every image is seen by one rank"
    measures = average_precision(data, [each for _, of_rank in every for each in of_rank], kinds)
    return measures | {"num_images": len(images_seen)}


def _together(batch: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _key(seed: int, step: int, target: dict[str, Tensor]) -> Tensor:
    """What an image's draws at a step depend on; it stays on the host, which draws."""
    words = np.random.SeedSequence([seed, step, int(target["image_id"])]).generate_state(1)
    return torch.from_numpy(words.astype(np.int64))


def _to(target: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in target.items()}
