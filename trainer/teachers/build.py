"""A frozen teacher as a recipe asks for it, or the reason why it cannot be had; never one with a random head."""

import logging

import torch
from torch import nn

from trainer import distributed
from trainer.methods import AnyMethod
from trainer.methods.frozen import Frozen, FrozenTeacher
from trainer.models.backbones import Branch, check_sizes, num_features
from trainer.models.heads import FrozenHead
from trainer.recipe import Recipe, RecipeError
from trainer.teachers.sources import Found, find

log = logging.getLogger(__name__)


def build_frozen(recipe: Recipe) -> FrozenTeacher:
    """The recipe's frozen teacher; prototypes that are still to be fitted are zero.

    raises: WeightsError if its source is not what it should be; RecipeError if it does not fit the method or the views
    """
    config, method, views = recipe.teacher, recipe.method, recipe.views
    assert isinstance(config, Frozen)
    found = find(config)
    try:
        check_sizes(found.backbone, [views.global_views.size], block="teacher")
    except ValueError as error:
        raise RecipeError(f"teacher.source {config.source}: {error}") from error
    tokens = method.wants_tokens
    if tokens and not hasattr(found.backbone, "num_prefix_tokens"):
        raise RecipeError(
            f"method.{method.name} compares patches, and {found.origin} has none; choose a vision transformer as "
            "teacher, or a method without patches"
        )
    teacher = FrozenTeacher(
        Branch(found.backbone, _head(config, method, found)),
        mean=config.mean or found.mean,
        std=config.std or found.std,
        student_mean=views.mean,
        student_std=views.std,
        tokens=tokens,
    )
    _check_width(config, method, teacher)
    if distributed.is_main():
        log.info("frozen teacher: %s", found.origin)
    return teacher


def takes_features(method: AnyMethod) -> bool:
    """Whether the method compares the backbone's features, and needs no head."""
    return bool(getattr(method, "takes_features", False))


def _head(config: Frozen, method: AnyMethod, found: Found) -> FrozenHead:
    if takes_features(method):
        if config.prototypes is not None:
            raise RecipeError(f"teacher.prototypes: method.{method.name} compares features and has no use for any")
        return FrozenHead(None, None)
    if found.head is not None:
        if config.prototypes is not None:
            raise RecipeError(f"teacher.prototypes: {found.origin} has a head of its own; take teacher.prototypes out")
        return found.head
    if config.prototypes is None:
        raise RecipeError(
            f"method.{method.name} needs a teacher with a head, and {found.origin}; give a full checkpoint, fit "
            "prototypes on its features (teacher.prototypes.count=K), or train with method.name regression or seed"
        )
    return FrozenHead(nn.Identity(), torch.zeros(config.prototypes.count, num_features(found.backbone)))


def _check_width(config: Frozen, method: AnyMethod, teacher: FrozenTeacher) -> None:
    """Teacher and student meet in what the method compares, so their outputs must be equally wide."""
    head = teacher.head
    key = "num_prototypes" if hasattr(method, "num_prototypes") else "out_dim"
    if key == "num_prototypes" and head.prototypes is None:
        raise RecipeError(f"method.{method.name} needs a teacher with prototypes, and {config.source} has none")
    width = head.width(num_features(teacher.branch.backbone))
    if width != getattr(method, key):
        raise RecipeError(
            f"method.{key} is {getattr(method, key)}, and the output of the teacher {config.source} has {width} "
            f"numbers; set method.{key}={width}"
        )
