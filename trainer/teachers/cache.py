"""What a frozen teacher said of the views of its first epochs, kept on the disk for the epochs that repeat them.

    RUN/teacher_cache/embeddings.f32   (E, N, T * ...) float32: view epoch, image, the teacher's views of it
    RUN/teacher_cache/checksums.u32    (E, N) of each row; 0 where nothing has been written yet
    RUN/teacher_cache/made_of.json     whose, and of which views

Views are a pure function of (seed, epoch, sample, view), so a row belongs to (epoch mod E, sample) and to nothing else:
not to a rank, not to a batch. A row counts only if its checksum is right. So ranks on several hosts, a kill in the
middle of a write or a crash of the machine cost time at most: what is not there, or not whole, is computed again.
"""

import json
import logging
import math
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import distributed
from trainer.methods.frozen import Frozen, FrozenTeacher
from trainer.methods.joint_embedding import Method
from trainer.recipe import Recipe, RecipeError
from trainer.run_dir import write_json

log = logging.getLogger(__name__)
FOLDER, ROWS, SUMS, MADE_OF = "teacher_cache", "embeddings.f32", "checksums.u32", "made_of.json"


class EmbeddingCache:
    """Rows of E epochs by the ids of their images; every rank reads and writes the same files."""

    def __init__(self, folder: Path, *, epochs: int, sample_ids: NDArray[np.int64], shape: tuple[int, ...]) -> None:
        """shape: (T, ...) of what is kept of one image; the files must be there"""
        self._ids, self._shape = np.sort(sample_ids), shape
        size = (epochs, len(self._ids))
        self._rows = np.memmap(folder / ROWS, np.float32, mode="r+", shape=(*size, math.prod(shape)))
        self._sums = np.memmap(folder / SUMS, np.uint32, mode="r+", shape=size)

    def read(self, epoch: int, sample_ids: Tensor) -> Tensor | None:
        """The batch's embeddings, (T * B, ...) on the CPU, view-major; None if one is not there.

        epoch: that of the views, below E
        """
        places = np.searchsorted(self._ids, sample_ids.numpy())
        rows, sums = self._rows[epoch, places], self._sums[epoch, places]
        if not all(zlib.crc32(row) == wanted for row, wanted in zip(rows, sums.tolist(), strict=True)):
            return None
        return torch.from_numpy(rows).view(len(rows), *self._shape).transpose(0, 1).flatten(0, 1)

    def write(self, epoch: int, sample_ids: Tensor, embeddings: Tensor) -> None:
        """Keep a batch's (T * B, ...) embeddings, view-major."""
        batch = len(sample_ids)
        of_images = embeddings.cpu().view(self._shape[0], batch, *self._shape[1:]).transpose(0, 1)
        rows = of_images.reshape(batch, -1).numpy()
        for place, row in zip(np.searchsorted(self._ids, sample_ids.numpy()), rows, strict=True):
            self._rows[epoch, place] = row
            self._sums[epoch, place] = zlib.crc32(row)


def shape_of(recipe: Recipe, method: Method, teacher: FrozenTeacher) -> tuple[int, ...]:
    """(T, ...) of what the teacher says of one image, found by showing it a blank one."""
    device = next(teacher.buffers()).device
    sizes = [view.size for view in recipe.views.each()]
    views = [torch.zeros(sizes.count(size), 3, size, size, device=device) for size in dict.fromkeys(sizes)]
    return tuple(teacher.embed(method.teacher_views(views)).shape)


def num_bytes(epochs: int, num_samples: int, shape: tuple[int, ...]) -> int:
    """Of both files: 4 for every number, and 4 for every row's checksum."""
    return epochs * num_samples * 4 * (math.prod(shape) + 1)


def open_cache(
    recipe: Recipe, method: Method, teacher: FrozenTeacher, sample_ids: NDArray[np.int64]
) -> EmbeddingCache | None:
    """The run's cache, if the recipe wants one: as it was left, or a new one; all ranks call it.

    raises: RecipeError on every rank if the disk has no room
    """
    assert isinstance(recipe.teacher, Frozen)
    epochs, folder = recipe.teacher.cache_epochs, recipe.run.dir / FOLDER
    if epochs == 0:
        return None
    shape = shape_of(recipe, method, teacher)
    facts = {"teacher": teacher.digest, "seed": recipe.seed, "views": recipe.plain()["views"]}
    facts |= {"epochs": epochs, "num_samples": len(sample_ids), "shape": list(shape)}
    fault = distributed.from_main(
        _make(folder, facts, epochs, len(sample_ids), shape) if distributed.is_main() else None
    )
    if fault is not None:
        raise RecipeError(fault)
    return EmbeddingCache(folder, epochs=epochs, sample_ids=sample_ids, shape=shape)


def _make(folder: Path, facts: dict[str, Any], epochs: int, num_samples: int, shape: tuple[int, ...]) -> str | None:
    """Reserve the files' room on the disk, unless they are there for the same teacher and views; the fault, or None."""
    size = num_bytes(epochs, num_samples, shape)
    made_of = folder / MADE_OF
    if made_of.is_file() and json.loads(made_of.read_text(encoding="utf-8")) == facts:
        log.info("teacher cache: %s, as the run left it", folder)
        return None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log.info("teacher cache: %s, %s", folder, describe(epochs, num_samples, shape))
    free = shutil.disk_usage(folder).free
    try:
        if size > free:
            raise OSError(f"{free / 1e9:.3g} GB are free")
        create_files(folder, epochs=epochs, num_samples=num_samples, shape=shape)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return (
            f"teacher.cache_epochs {epochs}: the cache takes {size / 1e9:.3g} GB in {folder.parent}, and {error}; "
            "lower cache_epochs, or put run.dir on a larger disk"
        )
    write_json(made_of, facts)
    return None


def create_files(folder: Path, *, epochs: int, num_samples: int, shape: tuple[int, ...]) -> None:
    """Empty files with their room reserved: a full disk found later would kill ranks by SIGBUS. raises: OSError"""
    sums = 4 * epochs * num_samples
    for name, size in ((ROWS, sums * math.prod(shape)), (SUMS, sums)):
        with (folder / name).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def describe(epochs: int, num_samples: int, shape: tuple[int, ...]) -> str:
    """The cache's size in words."""
    size = num_bytes(epochs, num_samples, shape) / 1e9
    numbers = " x ".join(str(number) for number in shape)
    return f"{size:.3g} GB: {epochs} epochs of {num_samples:,} images, {numbers} numbers each in fp32"
