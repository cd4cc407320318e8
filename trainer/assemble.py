"""Puts a run together from its recipe: network, method, teacher, optimizer, engine and loader."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_prep.schema import BetonInfo, open_beton, read_labels
from trainer import distributed
from trainer.data.loader import ViewLoader
from trainer.engine import build_engine
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMA, EMATeacher
from trainer.models.backbones import build_backbone, synchronise_batchnorm
from trainer.optim import build_optimizer, param_groups
from trainer.recipe import Recipe, RecipeError
from trainer.schedules import Schedules

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Assembly:
    """The parts of a run; `method` is the module that `engine` wraps."""

    loader: ViewLoader
    schedules: Schedules
    method: Method
    teacher: EMATeacher | None
    engine: "DeepSpeedEngine"


def count_steps(recipe: Recipe) -> int:
    """Steps an epoch, after a look at the data: what is wrong with them is said before anything is written.

    raises: BetonError if a file is no beton of ours; RecipeError if it holds too little for what the recipe asks
    """
    train = open_beton(recipe.data.train)
    if recipe.data.val is not None:
        unlabelled = [info.path for info in (train, open_beton(recipe.data.val)) if not info.labelled]
        if unlabelled:
            raise RecipeError(
                f"data.val is there to evaluate with, and {unlabelled[0]} has no labels; convert class folders, or "
                "train without data.val"
            )
    if recipe.probe:
        count_classes(train)
    if train.num_samples < recipe.optim.global_batch:
        raise RecipeError(
            f"data.train {recipe.data.train} holds {train.num_samples} images, less than one global batch of "
            f"{recipe.optim.global_batch}; lower optim.global_batch or convert more images"
        )
    return train.num_samples // recipe.optim.global_batch


def count_classes(beton: BetonInfo) -> int:
    """How many classes the probe has to tell apart.

    raises: RecipeError if images have no label
    """
    if not beton.labelled:
        raise RecipeError(
            f"probe: true trains a classifier, and {beton.path} has images without a label; convert class folders, or "
            "set probe=false"
        )
    return len(beton.classes) if beton.classes else int(read_labels(beton.path).max()) + 1


def assemble(recipe: Recipe, ds_config: dict[str, Any], device: torch.device) -> Assembly:
    """Build every part, the same on every rank."""
    schedules = recipe.schedules(count_steps(recipe))
    loader = build_loader(recipe)
    method = build_method(recipe)
    if recipe.probe:
        method.add_probe(count_classes(open_beton(recipe.data.train)))
    if recipe.backbone.sync_batchnorm:
        synchronise_batchnorm(method, device)
    method.to(device)
    teacher = EMATeacher(method.student) if isinstance(recipe.teacher, EMA) else None
    optimizer = build_optimizer(recipe.optim, param_groups(method, method.frozen_parameters()))
    engine = build_engine(method, optimizer, ds_config)
    seed_everything(recipe.seed, distributed.rank())
    return Assembly(loader, schedules, method, teacher, engine)


def build_method(recipe: Recipe) -> Method:
    """The method with its freshly initialised networks: a pure function of the recipe's seed."""
    seed_everything(recipe.seed)
    return recipe.method.build(build_backbone(recipe.backbone), recipe.views.counts)


def build_loader(recipe: Recipe) -> ViewLoader:
    """This rank's share of the training views."""
    views, data = recipe.views, recipe.data
    return ViewLoader(
        Path(data.train),
        views.each(),
        batch_size=recipe.micro_batch(distributed.world()),
        seed=recipe.seed,
        rank=distributed.rank(),
        world=distributed.world(),
        num_workers=data.num_workers,
        on_bad_image=data.on_bad_image,
        resize=views.resize,
        colour=views.colour,
    )


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed every global generator, differently on every rank: drop-path and the like may not agree over ranks."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
