"""Puts a run together from its recipe: network, method, teacher, optimizer, engine and loader."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.schema import BetonInfo, open_beton, read_labels
from trainer import distributed
from trainer.data.loader import ViewLoader
from trainer.data.subset import read_subset
from trainer.engine import build_engine, whole, zero_stage
from trainer.generators import seed_everything
from trainer.methods.frozen import Frozen, FrozenTeacher
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMA, EMATeacher
from trainer.models.backbones import build_backbone, check_sizes, synchronise_batchnorm
from trainer.models.gating import check_target, gate_parameters
from trainer.optim import build_optimizer, param_groups
from trainer.recipe import Recipe, RecipeError
from trainer.run_state import RunState, load_engine, load_generators, load_networks
from trainer.schedules import Schedules
from trainer.teachers.build import build_frozen
from trainer.teachers.cache import EmbeddingCache, open_cache
from trainer.teachers.prototypes import check_count, give_prototypes

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Assembly:
    """The parts of a run; `method` is the module that `engine` wraps."""

    loader: ViewLoader
    schedules: Schedules
    method: Method
    plain: Method
    """`method` itself, but under ZeRO 3, which keeps its parameters in pieces, a copy for `readable` to fill."""
    teacher: EMATeacher | FrozenTeacher | None
    cache: EmbeddingCache | None
    """Of a frozen teacher's outputs."""
    engine: "DeepSpeedEngine"
    first_step: int
    """How many steps were trained before."""


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
    subset = read_subset(recipe.data.train, recipe.data.subset)
    num_samples = train.num_samples if subset is None else len(subset)
    if num_samples < recipe.optim.global_batch:
        raise RecipeError(
            f"data.train {recipe.data.train} holds {num_samples} images{'' if subset is None else ' of data.subset'}, "
            f"less than one global batch of {recipe.optim.global_batch}; lower optim.global_batch or give more images"
        )
    if recipe.data.val is not None and recipe.evals.knn.every_epochs and recipe.evals.knn.k > num_samples:
        raise RecipeError(f"evals.knn.k is {recipe.evals.knn.k}, and data.train holds {num_samples} images; lower it")
    return num_samples // recipe.optim.global_batch


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


def check_backbone(recipe: Recipe) -> None:
    """Whether the network takes every size and does all that the method asks of it; RecipeError if it does not."""
    views, knn = recipe.views, recipe.evals.knn
    sizes = {view.size for view in views.each()}
    evaluated = {knn.size} if recipe.data.val is not None and knn.every_epochs else set()
    try:
        network = build_backbone(recipe.backbone)
        check_target(network, sizes)
        check_sizes(network, sizes | evaluated)
        recipe.method.build(network, recipe.views.counts)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def check_teacher(recipe: Recipe) -> FrozenTeacher | None:
    """The frozen teacher, if it can be had and fits, before anything is written; WeightsError, RecipeError if not."""
    if not isinstance(recipe.teacher, Frozen):
        return None
    check_count(recipe)
    teacher, method = build_frozen(recipe), build_method(recipe)
    hand_over_prototypes(teacher, method)
    if recipe.method.wants_tokens:
        _check_patches(recipe, teacher, method)
    return teacher


@torch.no_grad()
def _check_patches(recipe: Recipe, teacher: FrozenTeacher, method: Method) -> None:
    """A patch of the student's must be one of the teacher's."""
    size = recipe.views.global_views.size
    image = torch.zeros(1, 3, size, size)
    of_teacher, of_student = teacher.embed([image]).shape[1] - 1, method.student([image]).shape[1] - 1
    if of_teacher != of_student:
        raise RecipeError(
            f"method.{recipe.method.name} compares patches, and a view of {size} px has {of_student} for the student, "
            f"{of_teacher} for the teacher; take a backbone with the teacher's patch size, or set method.patch_weight=0"
        )


def hand_over_prototypes(teacher: EMATeacher | FrozenTeacher | None, method: Method) -> None:
    """A frozen teacher's prototypes, for methods that score the student's embeddings against them.

    raises: RecipeError if they are not as wide as these
    """
    if isinstance(teacher, FrozenTeacher) and teacher.head.prototypes is not None:
        try:
            method.adopt(teacher.head.prototypes if teacher.head.bias is None else None)
        except ValueError as error:
            raise RecipeError(str(error)) from error


def assemble(
    recipe: Recipe,
    ds_config: dict[str, Any],
    device: torch.device,
    saved: RunState | None,
    frozen: FrozenTeacher | None = None,
) -> Assembly:
    """Build every part, the same on every rank, as it was in the saved state if there is one.

    frozen: what `check_teacher` has read already, whose file may be large
    raises: StateError if the saved state is of other networks
    """
    schedules = recipe.schedules(count_steps(recipe))
    loader = build_loader(recipe, device)
    method = build_method(recipe, num_classes=count_classes(open_beton(recipe.data.train)) if recipe.probe else None)
    if recipe.backbone.sync_batchnorm:
        synchronise_batchnorm(method, device)
    method.to(device)
    teacher = frozen or build_teacher(recipe, method)
    if isinstance(teacher, FrozenTeacher):
        give_prototypes(recipe, teacher.to(device), device)
    hand_over_prototypes(teacher, method)
    if saved is not None:
        load_networks(saved, method, teacher)  # now: the engine takes its own copies, and ZeRO 3 the parameters apart
    plain = copy.deepcopy(method) if zero_stage(ds_config) == 3 else method
    optimizer = build_optimizer(recipe.optim, _groups(recipe, method))
    engine = build_engine(method, optimizer, ds_config)
    if recipe.run.compile:
        engine.compile()
    if saved is not None:
        load_engine(saved, engine, method, teacher)
    load_generators(saved, recipe.seed)
    cache = open_cache(recipe, plain, teacher, loader.sample_ids) if isinstance(teacher, FrozenTeacher) else None
    return Assembly(loader, schedules, method, plain, teacher, cache, engine, 0 if saved is None else saved.step)


def _groups(recipe: Recipe, method: Method) -> list[dict[str, Any]]:
    gates = recipe.backbone.gates
    scale = 1.0 if gates is None else gates.lr_scale
    return param_groups(method, method.frozen_parameters(), gate_parameters(method), gate_lr_scale=scale)


def readable(run: Assembly) -> Method:
    """The method as it is now, its parameters whole and without ZeRO's hooks; all ranks must call it.

    Under ZeRO 3 the hooks would gather and drop every layer, and ranks that evaluate unequal numbers of images hang.
    """
    if run.plain is not run.method:
        with whole(run.engine, run.method.parameters()):
            run.plain.load_state_dict(run.method.state_dict())
    return run.plain


def build_method(recipe: Recipe, *, num_classes: int | None = None) -> Method:
    """The method with its freshly initialised networks, a pure function of the recipe's seed.

    num_classes: of the probe, which comes last, so that it shifts no other draw; None for no probe
    """
    seed_everything(recipe.seed)
    method = recipe.method.build(build_backbone(recipe.backbone), recipe.views.counts)
    if num_classes is not None:
        method.add_probe(num_classes)
    return method


def build_teacher(recipe: Recipe, method: Method) -> EMATeacher | FrozenTeacher | None:
    """The teacher that a run of the recipe starts with."""
    if isinstance(recipe.teacher, Frozen):
        return build_frozen(recipe)
    return EMATeacher(method.student) if isinstance(recipe.teacher, EMA) else None


def build_loader(recipe: Recipe, device: torch.device) -> ViewLoader:
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
        subset=read_subset(data.train, data.subset),
        on_bad_image=data.on_bad_image,
        resize=views.resize,
        colour=views.colour,
        photometric=views.photometric_on(device.type),
    )
