"""Batches of views from a beton: stock FFCV reads, one operation of ours decodes each image once and cuts its views."""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.schema import BetonError, open_beton, read_labels, sample_names
from trainer.data.kernel import JOB, STATUS, Colour, Kernel, Resize
from trainer.data.order import epoch_order, rank_batches
from trainer.data.views import CenterView, View

log = logging.getLogger(__name__)


class DataError(ValueError):
    """The data cannot be used as asked; says what was wanted, what came and what to do."""


@dataclass
class Batch:
    """Views of B samples. `views` are valid until the next batch is asked for, the rest for ever."""

    views: list[Tensor]
    """One (V, B, 3, S, S) uint8 tensor a run of consecutive views of one size, channels-last in memory."""
    sample_ids: Tensor
    """(B,) int64, row indices of the beton."""
    labels: Tensor
    """(B,) int64, -1 where there is none."""
    num_bad: int
    """Samples that could not be decoded; each slot holds another sample of the batch: its views, id and label."""
    params: list[NDArray[np.void]] | None = None
    """photometric="device" only: what to apply to `views`, one (V, B) array of kernel.PARAMS a run."""


class ViewLoader:
    """Batches of views of a beton, the same on any number of ranks and threads.

    Views are a pure function of (seed, epoch, sample id, view index), and the order of (seed, epoch).

    on_bad_image: "fail" raises and names the file; "replace" repeats another sample of the same batch in its place
    (the next good slot, cyclically), views, id and label, counts it in Batch.num_bad and logs its name once
    photometric: "device" leaves colour, blur and solarisation to photometric.apply
    raises: DataError, data_prep.schema.BetonError
    """

    def __init__(
        self,
        beton: Path,
        views: Sequence[View | CenterView],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 1,
        subset: Sequence[int] | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        on_bad_image: Literal["fail", "replace"] = "fail",
        resize: Resize = "bicubic",
        colour: Colour = "exact",
        photometric: Literal["cpu", "device"] = "cpu",
        timeout_s: float = 120,
    ) -> None:
        self.beton, self.batch_size, self.timeout_s = Path(beton), batch_size, timeout_s
        self._seed, self._shuffle, self._replace = seed, shuffle, on_bad_image == "replace"
        self._share = partial(rank_batches, batch_size=batch_size, rank=rank, world=world, drop_last=drop_last)
        total = open_beton(self.beton).num_samples
        self._ids = _checked_subset(self.beton, subset, total)
        self._labels = read_labels(self.beton)
        self._logged: set[int] = set()
        self._device_params = photometric == "device"
        self.num_samples = len(self._ids)
        self.num_batches = len(self._share(np.arange(self.num_samples)))
        if not views:
            raise DataError("a loader needs at least one view, got none; add one to the recipe")
        if self.num_samples == 0 or (drop_last and self.num_batches == 0):
            raise DataError(
                f"{self.beton}: {self.num_samples} samples make no full batch of {batch_size * world} "
                "(batch_size x world); use a smaller batch, or drop_last=False"
            )
        self._kernel = Kernel(
            views, seed=seed, num_threads=num_workers, resize=resize, colour=colour, geometry_only=self._device_params
        )
        with _torch_threads_kept():
            from trainer.data import multicrop

            self._multicrop = multicrop
            self._ffcv = multicrop.open_loader(self.beton, self._kernel, batch_size)
        self._thread: Any = None

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """(num_samples,) the ids of all its images."""
        return self._ids

    def epoch(self, epoch: int, *, start: int = 0, view_epoch: int | None = None) -> Generator[Batch, None, None]:
        """The batches of one epoch on this rank, from sample position `start` of the whole epoch's order on.

        view_epoch: the epoch whose views they show, if another than their own

        A batch's views are overwritten once the next one is asked for: copy what must live longer. Leaving early is
        safe; only one epoch of a loader runs at a time, and starting another ends the one before.

        raises: DataError for a bad image under "fail", or when FFCV fails or hangs
        """
        if not self._end_epoch():
            raise DataError(f"{self.beton}: the thread of an earlier epoch still hangs; start the process again")
        order = self._ids[epoch_order(self.num_samples, seed=self._seed, epoch=epoch, shuffle=self._shuffle)]
        batches = self._share(order, start=start)
        if not batches:
            return
        self._kernel.set_epoch(epoch if view_epoch is None else view_epoch)
        thread = self._thread = self._multicrop.EpochThread(self._ffcv, np.concatenate(batches))
        try:
            for expected, (pixels, jobs) in zip(batches, self._items(thread), strict=True):
                assert np.array_equal(jobs[:, JOB.index("sample_id")], expected)
                yield self._batch(pixels, jobs)
        finally:
            thread.close()

    def _items(self, thread: Any) -> Iterator[Any]:
        try:
            yield from thread.batches(self.timeout_s)
        except Exception as error:
            raise DataError(f"{self.beton}: FFCV made no batch: {error}") from error

    def _batch(self, pixels: NDArray[np.uint8], jobs: NDArray[np.int64]) -> Batch:
        count = len(jobs)
        runs = [torch.from_numpy(run).view(-1, count, *run.shape[1:]) for run in self._kernel.split(pixels, count)]
        num_bad = self._repair(runs, jobs)
        ids = jobs[:, JOB.index("sample_id")].copy()
        return Batch(
            views=[run.permute(0, 1, 4, 2, 3) for run in runs],
            sample_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(self._labels[ids]),
            num_bad=num_bad,
            params=self._params(jobs) if self._device_params else None,
        )

    def _params(self, jobs: NDArray[np.int64]) -> list[NDArray[np.void]]:
        ids, widths, heights = (jobs[:, JOB.index(name)] for name in ("sample_id", "width", "height"))
        ends = np.cumsum([count for count, _ in self._kernel.runs])[:-1]
        return np.split(self._kernel.draw(ids, widths, heights), ends)

    def _repair(self, runs: list[Tensor], jobs: NDArray[np.int64]) -> int:
        """Fills the slots of bad samples from the next good slot, or raises; returns how many were bad."""
        bad = np.flatnonzero(jobs[:, JOB.index("status")])
        if not len(bad):
            return 0
        good = np.setdiff1d(np.arange(len(jobs)), bad)
        for slot in bad:
            self._report(*jobs[slot, [JOB.index("sample_id"), JOB.index("status")]].tolist())
        if not len(good):
            raise DataError(
                f"{self.beton}: not one of the {len(jobs)} images of a batch can be decoded; "
                "run `python -m data_prep verify` on it"
            )
        donors = good[np.searchsorted(good, bad) % len(good)]
        for run in runs:
            run[:, bad] = run[:, donors]
        jobs[bad] = jobs[donors]
        return len(bad)

    def _report(self, sample_id: int, status: int) -> None:
        message = f"{self.beton}: {self._name(sample_id)}: {STATUS[status]}"
        if not self._replace:
            raise DataError(f"{message}; convert the images again without it, or set on_bad_image to replace")
        if sample_id not in self._logged:
            self._logged.add(sample_id)
            log.warning("%s; another image of its batch takes its place", message)

    def _name(self, sample_id: int) -> str:
        try:
            return f"sample {sample_id} ({sample_names(self.beton)[sample_id]})"
        except BetonError:
            return f"sample {sample_id} (its file's name is not recorded)"

    def _end_epoch(self) -> bool:
        if self._thread is not None and self._thread.close():
            self._thread = None
        return self._thread is None

    def close(self) -> None:
        """Ends a running epoch and frees the kernel's memory. May be called twice."""
        if self._end_epoch():  # a thread that hangs may be using that memory
            self._kernel.close()


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Importing ffcv and making a Loader both set torch's number of threads."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _checked_subset(beton: Path, subset: Sequence[int] | None, total: int) -> NDArray[np.int64]:
    if subset is None:
        return np.arange(total, dtype=np.int64)
    ids = np.asarray(subset, dtype=np.int64)
    wrong = ids[(ids < 0) | (ids >= total)]
    if len(wrong):
        raise DataError(
            f"{beton}: the subset asks for sample {wrong[0]}, samples are 0 to {total - 1}; "
            "make the subset from this file's sample list"
        )
    return ids
