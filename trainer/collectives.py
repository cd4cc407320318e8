"""What a method itself says to other ranks in a step, found by running the real code beside ranks that do not exist."""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.assemble import build_method, build_teacher
from trainer.models.backbones import synchronise_batchnorm
from trainer.models.norm import SyncBatchNorm
from trainer.recipe import Recipe
from trainer.scaling import FP32, Collective, Kind
from trainer.schedules import Progress

KINDS: dict[str, Kind] = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}
"""torch's operators, and what the model of scaling calls them."""
Call = tuple[Kind, int]
"""A kind, and the bytes that a rank brings."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every collective that runs within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._write_down(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _write_down(self, operator: str, args: Any) -> None:
        if operator not in KINDS:
            raise ValueError(f"the model of scaling knows {', '.join(KINDS)}, and the step called {operator}")
        kind = KINDS[operator]
        brought = args[0] if kind == "all_reduce" else args[1]
        tensors = [brought] if isinstance(brought, Tensor) else brought
        self.calls.append((kind, sum(tensor.nbytes for tensor in tensors)))


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a step says for BatchNorm's statistics, and for the objective: centre, codes, queue.

    Each as (kind, bytes at 2 images a rank, bytes at 4) -> times: some of it grows with a rank's images.
    """

    norm: Counter[tuple[Kind, int, int]]
    objective: Counter[tuple[Kind, int, int]]

    def at(self, images: float) -> tuple[list[Collective], list[Collective]]:
        """Both, for so many images a rank and micro-batch."""
        return _at(self.norm, images), _at(self.objective, images)


def _at(counted: Counter[tuple[Kind, int, int]], images: float) -> list[Collective]:
    return [
        Collective(kind=kind, num_bytes=of_two + (of_four - of_two) * (images - 2) / 2, times=times)
        for (kind, of_two, of_four), times in counted.items()
    ]


def traffic(recipe: Recipe, *, num_classes: int | None) -> Traffic:
    """Run a step of the recipe's last epoch on blank images, twice; takes as long as six images do.

    BatchNorm is counted as it runs on CPUs, which gathers 3 numbers a channel where torch's on GPUs gathers 2.
    A process of its own does it, since a process may be in one group only, and this one may be in a real one.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_count, recipe, num_classes).result()


def _count(recipe: Recipe, num_classes: int | None) -> Traffic:
    of_two, norm = _calls(recipe, num_classes, images=2)
    of_four, _ = _calls(recipe, num_classes, images=4)
    every = Counter((kind, small, large) for (kind, small), (_, large) in zip(of_two, of_four, strict=True))
    of_norm = Counter((kind, size, size) for kind, size in norm)
    assert not of_norm - every, "BatchNorm says something else than its statistics"
    return Traffic(norm=of_norm, objective=every - of_norm)


def _calls(recipe: Recipe, num_classes: int | None, *, images: int) -> tuple[list[Call], list[Call]]:
    """The collectives of a step with so many blank images a micro-batch, gradients' not included; BatchNorm's alone."""
    method = build_method(recipe, num_classes=num_classes)
    if recipe.backbone.sync_batchnorm:
        synchronise_batchnorm(method, torch.device("cpu"))
    teacher = build_teacher(recipe, method)
    norm = _listen(method if teacher is None else nn.ModuleList([method, teacher]))
    progress = Progress(step=0, epoch=recipe.optim.epochs - 1, lr=0, weight_decay=0, momentum=0)
    sizes = [view.size for view in recipe.views.each()]
    views = [torch.zeros(sizes.count(size) * images, 3, size, size) for size in dict.fromkeys(sizes)]
    with _pretend_ranks(), Recorder() as recorder:
        for _ in range(recipe.optim.accumulation):
            target = None if teacher is None else teacher(method.teacher_views(views))
            labels = torch.zeros(images, dtype=torch.long)
            loss: Tensor = method(views, target, progress, labels, range(images)).total
            loss.backward()  # type: ignore[no-untyped-call]
        method.after_step(applied=True)
    return recorder.calls, norm


def _listen(module: nn.Module) -> list[Call]:
    """A list that will hold what synchronised BatchNorm says: mean, variance and count; the sums of the gradient."""
    calls: list[Call] = []

    def hear(norm: nn.Module, *_: object) -> None:
        assert isinstance(norm, SyncBatchNorm)
        calls.append(("all_gather", 3 * FP32 * norm.num_features))
        if torch.is_grad_enabled():
            calls.append(("all_reduce", 2 * FP32 * norm.num_features))

    for norm in module.modules():
        if isinstance(norm, SyncBatchNorm):
            norm.register_forward_hook(hear)
    return calls


@contextmanager
def _pretend_ranks() -> Iterator[None]:
    """A process group of two ranks, of which the other does not exist: collectives return at once, with anything."""
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()
