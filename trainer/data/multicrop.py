"""Our one operation for FFCV's loader, and its epoch thread made safe. Importing this imports ffcv and numba (seconds).

What stock FFCV 1.0.2 does when left alone, and what is done about it here:
- an exception in its thread leaves the consumer waiting for ever: the thread keeps it, and the consumer looks;
- leaving an epoch early leaves the thread and its buffers behind: `close` empties the queue and joins;
- an undecodable JPEG becomes black or, worse, an earlier image: our kernel reports a status for each sample.
"""

import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from queue import Empty
from time import monotonic
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from numpy.typing import NDArray

from trainer.data.kernel import JOB, LIB, Kernel

BATCHES_AHEAD = 2
"""Batches made ahead of the one in use; FFCV's default of 3 costs one more batch of memory and gains nothing."""

Item = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Flat view bytes and the table of jobs (columns: kernel.JOB) of one batch."""


class MultiCrop(SimpleRGBImageDecoder):  # type: ignore[misc]  # FFCV takes only a subclass as an image's decoder
    """Decodes each image of a batch once and cuts all its views; returns (view bytes, jobs)."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        pixels = AllocationQuery((self.kernel.sample_bytes,), np.dtype("u1"))
        jobs = AllocationQuery((len(JOB),), np.dtype("i8"))
        return replace(previous_state, jit_mode=True, shape=pixels.shape, dtype=pixels.dtype), (pixels, jobs)

    def generate_code(self) -> Callable[..., Any]:
        """Compiled by numba, hence as short as can be: it only looks up where each image lies."""
        read, make_batch, context = self.memory_read, LIB.views_batch, np.int64(self.kernel.context)

        def multicrop(batch_indices: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
            pixels, jobs = memory
            for i in range(len(batch_indices)):
                sample_id = batch_indices[i]
                field = metadata[sample_id]
                data = read(field["data_ptr"], storage_state)
                jobs[i, 0], jobs[i, 1] = data.ctypes.data, data.size
                jobs[i, 2], jobs[i, 3], jobs[i, 4] = field["mode"], field["width"], field["height"]
                jobs[i, 5], jobs[i, 6] = sample_id, 0
            make_batch(context, jobs.ctypes.data, len(batch_indices), pixels.ctypes.data)
            return pixels[: len(batch_indices)], jobs[: len(batch_indices)]

        return multicrop


class SampleTable(OSCacheManager):  # type: ignore[misc]
    """Where each sample lies. FFCV's own also notes every page of every sample in dictionaries that only its process
    cache reads: for ImageNet's 1.28 M samples they take seconds and 0.6 GB a rank."""

    def __init__(self, reader: Reader) -> None:
        table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
        self.reader, self.ptrs, self.sizes = reader, table["ptr"].copy(), table["size"].copy()
        self.context = OSCacheContext(self)


def open_loader(beton: Path, kernel: Kernel, batch_size: int) -> Loader:
    """A stock FFCV loader that runs only our operation. Threads are the kernel's business, so FFCV gets one."""
    pipelines: dict[str, Any] = dict.fromkeys(Reader(str(beton)).handlers)
    pipelines["image"] = [MultiCrop(kernel)]
    with patch("ffcv.loader.loader.OSCacheManager", SampleTable):
        loader = Loader(
            str(beton),
            batch_size,
            num_workers=1,
            os_cache=True,
            drop_last=False,
            seed=0,
            batches_ahead=BATCHES_AHEAD,
            pipelines=pipelines,
        )
    # FFCV would allocate (and pin) its buffers anew in every epoch; one epoch runs at a time, so one set is enough.
    loader.graph.allocate_memory = cache(loader.graph.allocate_memory)
    return loader


class EpochThread(EpochIterator):  # type: ignore[misc]
    """FFCV's thread that fills batches of `order`; it starts at once. Use `batches`, then `close`."""

    def __init__(self, loader: Loader, order: NDArray[np.int64]) -> None:
        self.error: BaseException | None = None
        self._torch_threads = torch.get_num_threads()
        super().__init__(loader, order.astype(np.uint64))

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # handed to the consumer by `batches`
            self.error = error

    def run_pipeline(self, number: int, *rest: Any) -> Any:
        if number == 0:  # FFCV has just set it to its own number of threads
            torch.set_num_threads(self._torch_threads)
        return super().run_pipeline(number, *rest)

    def batches(self, timeout_s: float) -> Iterator[Item]:
        """The batches in order. raises: the thread's own error, TimeoutError with the thread's stack."""
        while (item := self._get(timeout_s)) is not None:
            yield item[1][0]

    def _get(self, timeout_s: float) -> Any:
        deadline = monotonic() + timeout_s
        while True:
            alive = self.is_alive()  # asked before the queue: a thread's last words are still in it
            try:
                return self.output_queue.get(timeout=0.2 if alive else 0.01)
            except Empty:
                if self.error is not None:
                    raise self.error from None
                if not alive:
                    raise RuntimeError("FFCV's thread ended without a batch and without an error") from None
            if monotonic() > deadline:
                raise TimeoutError(f"no batch for {timeout_s:g} s; FFCV's thread is at:\n{self._stack()}")

    def _stack(self) -> str:
        frame = sys._current_frames().get(self.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "(ended)"

    def close(self, timeout_s: float = 10.0) -> bool:
        """Ends the thread after the batch it is making; a batch in use stays as it is. False if the thread hangs.

        FFCV looks at its own end signal only while its queue is full, so the thread is left without work instead, and
        the queue is emptied for it to get past `put`.
        """
        super().close()
        self.iter_ixes = iter(())
        deadline = monotonic() + timeout_s
        while self.is_alive() and monotonic() < deadline:
            while not self.output_queue.empty():
                self.output_queue.get_nowait()
            self.join(0.01)
        return not self.is_alive()
