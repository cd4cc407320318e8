"""What a run tells: metrics.jsonl, TensorBoard, and one console line or progress bar; rank 0 writes."""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from trainer import distributed

log = logging.getLogger(__name__)
EVALUATIONS = ("knn/", "probe/val_")
"""How the names of an evaluation's results begin."""


class Averages:
    """Means of scalars over steps and ranks; they stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Take one micro-batch's values; every rank must give the same names."""
        for name, value in values.items():
            plain = value.detach().float() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + plain
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means since the last reading, the same on every rank; the only wait for the device."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        device = distributed.local_device()
        means = [torch.as_tensor(self._sums[name] / self._counts[name], device=device).float() for name in names]
        values = distributed.mean_over_ranks(torch.stack(means)).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, values, strict=True))


class StepClock:
    """Seconds a step takes, and seconds of them that waited for data; host time, so no wait for the device."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self._steps = 0
        self._total_s = self._data_s = 0.0
        self._last = time.monotonic()

    def resume(self) -> None:
        """Start counting from here: what lies before was no training."""
        self._last = time.monotonic()

    def waits_for(self, load: Any, *args: Any) -> Any:
        """Call a function whose time counts as waiting for data."""
        start = time.monotonic()
        result = load(*args)
        self._data_s += time.monotonic() - start
        return result

    def tick(self) -> None:
        """A step ends here."""
        now = time.monotonic()
        self._total_s += now - self._last
        self._last = now
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Means since the last reading."""
        step_s, data_s = self._total_s / self._steps, self._data_s / self._steps
        self._steps, self._total_s, self._data_s = 0, 0.0, 0.0
        return {"step_time_s": step_s, "data_time_s": data_s, "images_per_s": self._global_batch / step_s}


class MetricLog:
    """Writes records to metrics.jsonl and TensorBoard, and shows how far a run is; does nothing on other ranks."""

    def __init__(self, run_dir: Path, first_step: int, num_steps: int, *, tensorboard: bool) -> None:
        self._started = time.monotonic()
        self._first_step, self._num_steps = first_step, num_steps
        self._file = self._board = self._bar = None
        self._evaluated = -1
        if distributed.is_main():
            path = run_dir / "metrics.jsonl"
            self._evaluated = _forget_from(path, first_step)
            self._file = path.open("a", encoding="utf-8")
            self._board = _tensorboard(run_dir / "tensorboard", first_step) if tensorboard else None
            self._bar = _progress_bar()
            self._task = self._bar.add_task("", total=num_steps, completed=first_step) if self._bar else None

    def evaluated(self, step: int) -> bool:
        """Whether the networks after that step have been evaluated before this process began; all ranks must ask."""
        return distributed.from_main(self._evaluated) >= step

    def write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl; numbers go to TensorBoard too. `step` says where it belongs."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, record["step"])
            self._board.flush()

    def show(self, record: dict[str, Any]) -> None:
        """The state of the run, for people: a bar on a terminal, a line elsewhere."""
        if self._file is None:
            return
        done = record["step"] + 1
        line = (
            f"epoch {record['epoch']}  loss {record['loss']:.4f}  lr {record['lr']:.3g}  "
            f"{record['images_per_s']:.0f} images/s  data {record['data_time_s'] / record['step_time_s']:.0%}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=line)
            self._bar.start()
        else:
            log.info("step %d/%d  %s  ETA %s", done, self._num_steps, line, clock(self._eta_s(done)))

    def _eta_s(self, done: int) -> float:
        return (time.monotonic() - self._started) / (done - self._first_step) * (self._num_steps - done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is open."""
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()


def _forget_from(path: Path, first_step: int) -> int:
    """Cut off the records of steps that will be trained again, so that the file reads as one uninterrupted run.

    returns: the step of the last evaluation that stays, -1 for none
    """
    kept, evaluated = 0, -1
    if not path.exists():
        return evaluated
    for line in path.read_bytes().splitlines(keepends=True):
        record = json.loads(line) if line.endswith(b"\n") else {"step": first_step}  # a line that a kill cut in two
        if record["step"] >= first_step:
            break
        kept += len(line)
        if any(name.startswith(EVALUATIONS) for name in record):
            evaluated = record["step"]
    os.truncate(path, kept)
    return evaluated


def _tensorboard(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # seconds to import, and rank 0's alone

    return SummaryWriter(str(folder), purge_step=first_step)


def _progress_bar() -> Progress | None:
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:08:22."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
