"""`trainer show`: everything that a recipe decides, before anything is trained."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.schema import open_beton
from trainer.assemble import build_method, build_teacher, count_classes, count_steps
from trainer.data.contact_sheet import contact_sheet, draw_views
from trainer.data.kernel import Kernel
from trainer.data.order import epoch_order
from trainer.data.subset import read_subset
from trainer.methods.frozen import Frozen, FrozenTeacher
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMA, EMATeacher
from trainer.recipe import Recipe, RecipeError
from trainer.recipe_file import load_recipe
from trainer.scaling import Plan
from trainer.scaling_table import scaling_table, step_of
from trainer.schedules import Progress
from trainer.teachers.cache import describe, shape_of

IMAGENET_1K = 1_281_167
"""Train images; what a recipe's schedule is shown for where no data are given."""
NO_DATA = Path("DATA.beton")
"""Stands in the resolved recipe where no data are given."""


def show(
    recipe_path: Path, overrides: Sequence[str], *, out: Path | None, num_images: int, plan: Plan | None = None
) -> None:
    """Print the resolved recipe, views, parameters, cost a step and schedule; draw a contact sheet if there are data.

    out: the PNG to write; by default the recipe's name in the current folder
    plan: more nodes, to print what the recipe would do on them too
    raises: RecipeError, BetonError
    """
    recipe = load_recipe(recipe_path, overrides, train_if_missing=NO_DATA)
    has_data = recipe.data.train != NO_DATA
    steps = count_steps(recipe) if has_data else IMAGENET_1K // recipe.optim.global_batch
    console = Console(width=130)
    console.print(yaml.safe_dump(recipe.plain(), sort_keys=False), markup=False, highlight=False)
    console.print(view_table(recipe))
    classes = num_classes(recipe) if recipe.probe else None
    method = build_method(recipe, num_classes=classes)
    teacher = build_teacher(recipe, method)
    console.print(parameter_table(method, teacher))
    console.print(cost_table(recipe, method, teacher))
    if isinstance(teacher, FrozenTeacher) and isinstance(recipe.teacher, Frozen) and recipe.teacher.cache_epochs:
        shape = shape_of(recipe, method, teacher)
        console.print(f"teacher cache: {describe(recipe.teacher.cache_epochs, num_images_of(recipe), shape)}")
    schedule = schedule_table(recipe, steps, method)
    schedule.caption = (
        f"{recipe.data.train}" if has_data else f"no data.train given: ImageNet-1k's {IMAGENET_1K} images"
    )
    console.print(schedule)
    if plan is not None:
        console.print(scaling_table(step_of(recipe, method, teacher, num_classes=classes), recipe, plan))
    if has_data:
        path = out or Path(f"{recipe_path.stem}.views.png")
        save_contact_sheet(recipe, path, num_images=num_images)
        console.print(f"views of {num_images} images as training sees them in epoch 0: {path}", highlight=False)


def num_images_of(recipe: Recipe) -> int:
    """How many images an epoch is drawn from; ImageNet-1k's where no data are given."""
    if recipe.data.train == NO_DATA:
        return IMAGENET_1K
    subset = read_subset(recipe.data.train, recipe.data.subset)
    return open_beton(recipe.data.train).num_samples if subset is None else len(subset)


def num_classes(recipe: Recipe) -> int:
    """The probe's classes; ImageNet-1k's where no data are given."""
    return 1000 if recipe.data.train == NO_DATA else count_classes(open_beton(recipe.data.train))


def view_table(recipe: Recipe) -> Table:
    """One row a kind of view."""
    table = Table(title=f"Views: {recipe.views.resize}, {recipe.views.colour} colour")
    columns = ("views", "count", "px", "area", "flip", "jitter", "b c s h", "gray", "blur", "sigma", "solarise")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for name, group in (("global", recipe.views.global_views), ("local", recipe.views.local_views)):
        if group.count:
            strengths = (group.brightness, group.contrast, group.saturation, group.hue)
            table.add_row(
                name, str(group.count), str(group.size), _pair(group.scale), _each(group.flip_prob),
                _each(group.jitter_prob), " ".join(f"{value:g}" for value in strengths), _each(group.gray_prob),
                _each(group.blur_prob), _pair(group.blur_sigma), _each(group.solarize_prob),
            )  # fmt: skip
    return table


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:g} to {values[1]:g}"


def _each(value: float | tuple[float, ...]) -> str:
    return " / ".join(f"{v:g}" for v in (value if isinstance(value, tuple) else (value,)))


def parameter_table(method: Method, teacher: EMATeacher | FrozenTeacher | None) -> Table:
    """How many parameters each part has, and how many of them are trained."""
    table = Table(title="Parameters")
    for column in ("part", "parameters", "trained"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, part in _parts(method, teacher).items():
        every = list(part.parameters())
        trained = sum(parameter.numel() for parameter in every if parameter.requires_grad)
        table.add_row(name, f"{sum(parameter.numel() for parameter in every):,}", f"{trained:,}")
    return table


def _parts(method: Method, teacher: EMATeacher | FrozenTeacher | None) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"backbone": method.student.backbone, "head": method.student.head}
    parts |= {name: child for name, child in method.named_children() if any(True for _ in child.parameters())}
    del parts["student"]
    everything = [method] if teacher is None else [method, teacher]
    return parts | ({} if teacher is None else {"teacher": teacher}) | {"all": nn.ModuleList(everything)}


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates for one image with all its views."""

    teacher: float
    student: float
    """Forward, the objective included."""

    @property
    def step(self) -> float:
        """All of it; the backward pass counts as two forward ones."""
        return self.teacher + 3 * self.student


@torch.no_grad()
def cost_of(recipe: Recipe, method: Method, teacher: EMATeacher | FrozenTeacher | None, batch_size: int = 2) -> Cost:
    """Count convolutions, matrix products and attention while the real code runs on `batch_size` blank images.

    The backward pass is not run: torch counts depth-wise convolutions wrongly there.
    """
    progress = Progress(step=0, epoch=0, lr=0, weight_decay=0, momentum=0)
    target: Tensor | None = None
    method, teacher = copy.deepcopy((method, teacher))  # the forward pass moves statistics of BatchNorm
    sizes = [view.size for view in recipe.views.each()]
    views = [torch.zeros(sizes.count(size) * batch_size, 3, size, size) for size in dict.fromkeys(sizes)]
    with FlopCounterMode(display=False) as counter:
        if teacher is not None:
            target = teacher(method.teacher_views(views))
        of_teacher = counter.get_total_flops()
        method(views, target, progress, torch.zeros(batch_size, dtype=torch.long), range(batch_size))
        of_student = counter.get_total_flops() - of_teacher
    return Cost(of_teacher / 2 / batch_size, of_student / 2 / batch_size)


def cost_table(recipe: Recipe, method: Method, teacher: EMATeacher | FrozenTeacher | None) -> Table:
    """What a step costs, an image and a global batch."""
    cost = cost_of(recipe, method, teacher)
    table = Table(title="Cost a step, 10^9 multiply-accumulates")
    for column in ("", "teacher forward", "student forward", "student backward (2 x)", "step"):
        table.add_column(column, justify="right")
    for name, count in (("one image", 1), (f"global batch of {recipe.optim.global_batch}", recipe.optim.global_batch)):
        parts = (cost.teacher, cost.student, 2 * cost.student, cost.step)
        table.add_row(name, *(f"{part * count / 1e9:,.2f}" for part in parts))
    return table


def schedule_table(recipe: Recipe, steps_per_epoch: int, method: Method) -> Table:
    """The values at the start, around the warm-up, at the quarters and at the end."""
    schedules = recipe.schedules(steps_per_epoch)
    steps = schedules.num_steps
    chosen = {0, 1, steps_per_epoch, schedules.warmup_steps, steps - steps_per_epoch, steps - 1}
    chosen |= {quarter * steps // 4 for quarter in (1, 2, 3)}
    table = Table(title=f"Schedule: {steps:,} steps, {steps_per_epoch:,} an epoch")
    for column in ("step", "epoch", *_scheduled(recipe, method, schedules.at(0))):
        table.add_column(column, justify="right")
    for step in sorted(step for step in chosen if 0 <= step < steps):
        at = schedules.at(step)
        values = _scheduled(recipe, method, at).values()
        table.add_row(f"{step:,}", str(at.epoch), *(f"{value:.10g}" for value in values))
    return table


def _scheduled(recipe: Recipe, method: Method, at: Progress) -> dict[str, float]:
    """Everything that changes with the steps."""
    values = {"learning rate": at.lr, "weight decay": at.weight_decay}
    if isinstance(recipe.teacher, EMA):
        values["teacher momentum"] = at.momentum
    return values | method.scheduled(at)


def save_contact_sheet(recipe: Recipe, path: Path, *, num_images: int) -> None:
    """Draw the first images of epoch 0, cut and coloured by the code and the seed of the training."""
    views, beton = recipe.views, recipe.data.train
    subset = read_subset(beton, recipe.data.subset)
    ids = subset or list(range(open_beton(beton).num_samples))
    chosen = [ids[place] for place in epoch_order(len(ids), seed=recipe.seed, epoch=0)[:num_images]]
    kernel = Kernel(views.each(), seed=recipe.seed, resize=views.resize, colour=views.colour)
    title = (
        f"{beton.name}, seed {recipe.seed}, epoch 0. Below each view: its number, the crop in pixels of the source; "
        "factors of brightness, contrast, saturation, and the turn of the hue; the blur's sigma in pixels of the view"
    )
    sheet = contact_sheet(draw_views(beton, kernel, chosen), title)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:  # PIL's word for a suffix that it does not know
        raise RecipeError(f"--out {path}: the picture cannot be written there ({error}); give a .png") from None
