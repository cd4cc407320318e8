"""The recipe: everything that shapes a run, as frozen dataclasses; `recipe_file` reads them from YAML."""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from trainer.data.views import View
from trainer.methods import AnyMethod
from trainer.methods.frozen import Frozen
from trainer.methods.joint_embedding import ViewCounts
from trainer.methods.teacher import EMA
from trainer.models.backbones import Backbone
from trainer.optim import Optim
from trainer.protocols import Evals, at_least
from trainer.schedules import Schedules

PerView = float | tuple[float, ...]
PER_VIEW = ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewGroup:
    """Views of one size. Probabilities are one number for all of them, or one number a view."""

    count: int
    size: int
    """Pixels a side."""
    scale: tuple[float, float]
    """Least and largest fraction of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: PerView = 0.5
    jitter_prob: PerView = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_prob: PerView = 0.2
    blur_prob: PerView
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Pixels of the view."""
    solarize_prob: PerView = 0.0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count must be at least 0, got {self.count}")
        for name in PER_VIEW:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.count:
                raise ValueError(f"{name} must be one number, or one for each of {self.count} views, got {value}")
        for index in range(max(1, self.count)):  # a view checks its own ranges, and one that is not cut has some too
            self._view(index)

    def views(self) -> list[View]:
        """The settings of each view."""
        return [self._view(index) for index in range(self.count)]

    def _view(self, index: int) -> View:
        shared = ("size", "scale", "ratio", "brightness", "contrast", "saturation", "hue", "blur_sigma")
        settings: dict[str, Any] = {name: getattr(self, name) for name in shared}
        for name in PER_VIEW:
            value = getattr(self, name)
            settings[name] = value[index] if isinstance(value, tuple) else value
        return View(**settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """All views of an image: the globals, then the locals."""

    global_views: ViewGroup
    local_views: ViewGroup
    resize: Literal["bicubic", "triangle"] = "bicubic"
    colour: Literal["exact", "linear"] = "exact"
    """exact: as torchvision, clamped after every change; linear: one matrix, faster, other on saturated pixels."""
    photometric: Literal["cpu", "device", "auto"] = "auto"
    """Where colour, blur and solarisation happen: in the loader's threads, or batched on the accelerator from the same
    drawn values (a few levels of 255 apart); auto: on the accelerator, if there is one and colour is exact."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.photometric == "device" and self.colour == "linear":
            raise ValueError("photometric device computes colour exactly; set colour to exact, or photometric to cpu")

    @property
    def counts(self) -> ViewCounts:
        """How many of each."""
        return ViewCounts(self.global_views.count, self.local_views.count)

    def photometric_on(self, device_type: str) -> Literal["cpu", "device"]:
        """Where the photometric changes of a run on such a device happen."""
        if self.photometric == "auto":
            return "cpu" if device_type == "cpu" or self.colour == "linear" else "device"
        return self.photometric

    def each(self) -> list[View]:
        """Every view's settings, in order."""
        return self.global_views.views() + self.local_views.views()


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What to train on, and what to evaluate with."""

    train: Path
    val: Path | None = None
    """Labelled; needed by evaluations only."""
    subset: Path | None = None
    """Use only the train images that this text file lists: names, or sample ids, one a line."""
    num_workers: int
    """Loader threads a rank."""
    on_bad_image: Literal["fail", "replace"] = "fail"
    """What to do about an image that does not decode: stop and name it, or use another of its batch and count it."""

    def __post_init__(self) -> None:
        at_least(self, num_workers=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalisation:
    """How pixels become a ready network's input; named as in a recipe's views."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an evaluation of ready weights depends on: the part of a recipe that it would read, under the same keys."""

    seed: int = 0
    data: Data
    evals: Evals
    views: Normalisation

    def plain(self) -> dict[str, Any]:
        """The settings as plain YAML types."""
        return typing.cast("dict[str, Any]", EVALUATION.dump_python(self, mode="json"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where a run lives and what it writes; nothing here changes the training."""

    dir: Path
    """Where a recipe file does not say, runs/ and the file's name."""
    log_every_steps: int
    checkpoint_every_epochs: float = 1.0
    keep_checkpoints: int = 2
    """How many of the newest stay."""
    keep_best: Literal["student", "teacher", "none"] = "student"
    """The checkpoint with this network's best k-NN top-1 so far stays too, if evals.knn evaluates during training."""
    tensorboard: bool = True
    hang_timeout_s: float = 1800.0
    """A rank that finishes no step for so long prints where it stands, and ends the job."""
    compile: bool = False
    """Compile what the engine wraps with torch's inductor: minutes at the start, the same training but for rounding."""

    def __post_init__(self) -> None:
        at_least(self, log_every_steps=1, keep_checkpoints=1)
        for field in ("checkpoint_every_epochs", "hang_timeout_s"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NoTeacher:
    """For methods that are their own teacher."""

    kind: Literal["none"]


Teacher = Annotated[EMA | Frozen | NoTeacher, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole run: method x teacher x backbone x views, on some data, for some epochs."""

    seed: int = 0
    method: Annotated[AnyMethod, Field(discriminator="name")]
    teacher: Teacher
    backbone: Backbone
    probe: bool = False
    """Train a linear classifier on the student's detached features beside it; needs labels, changes no student."""
    views: Views
    data: Data
    optim: Optim
    evals: Evals
    run: Run

    def schedules(self, steps_per_epoch: int) -> Schedules:
        """The run's schedules, once it is known how many steps an epoch has."""
        optim = self.optim
        moving = self.teacher if isinstance(self.teacher, EMA) else EMA(kind="ema", momentum=0, final_momentum=0)
        return Schedules(
            steps_per_epoch=steps_per_epoch,
            num_steps=optim.epochs * steps_per_epoch,
            warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
            warmup_lr=optim.warmup_lr,
            peak_lr=optim.peak_lr,
            final_lr=optim.final_lr,
            weight_decay=optim.weight_decay,
            final_weight_decay=optim.final_weight_decay,
            momentum=moving.momentum,
            final_momentum=moving.final_momentum,
            seed=self.seed,
        )

    def view_epoch(self, epoch: int) -> int:
        """The epoch whose views an epoch shows: its own, or an earlier one's whose teacher outputs are kept."""
        cached = self.teacher.cache_epochs if isinstance(self.teacher, Frozen) else 0
        return epoch % cached if cached else epoch

    def micro_batch(self, world: int) -> int:
        """Images a rank and micro-batch; RecipeError if the ranks do not divide the global batch."""
        pieces = self.optim.accumulation * world
        if self.optim.global_batch % pieces:
            near = max(1, round(self.optim.global_batch / pieces)) * pieces
            raise RecipeError(
                f"optim.global_batch {self.optim.global_batch} cannot be shared by {world} ranks x "
                f"{self.optim.accumulation} accumulation steps; set optim.global_batch={near}"
            )
        return self.optim.global_batch // pieces

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain YAML types."""
        return typing.cast("dict[str, Any]", ADAPTER.dump_python(self, mode="json"))


def what_shapes_training(plain: dict[str, Any]) -> dict[str, Any]:
    """A plain recipe without what changes no weight: where the run writes, its evaluations, its loader threads."""
    shaping = {key: value for key, value in plain.items() if key not in ("run", "evals")}
    shaping["data"] = {key: value for key, value in plain["data"].items() if key not in ("num_workers", "val")}
    return shaping


def _forbid_unknown_keys(kind: type) -> None:
    """Let pydantic refuse unknown keys in the dataclass and in those it holds."""
    kind.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    for hint in typing.get_type_hints(kind, include_extras=True).values():
        for inner in dataclasses_in(hint):
            _forbid_unknown_keys(inner)


def dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses that a type hint names, such as the members of a union."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [inner for arg in typing.get_args(hint) for inner in dataclasses_in(arg)]


for _whole in (Recipe, Evaluation):
    _forbid_unknown_keys(_whole)
ADAPTER, EVALUATION = TypeAdapter(Recipe), TypeAdapter(Evaluation)
