"""Progress on standard error: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class Meter:
    """Counts images done, with images/s and the time left."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._last_line = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task(what, total=total, rate="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Say that `count` more images are done."""
        self._done += count
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=count, rate=f"{self.images_per_s:.0f} images/s")
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            left_s = (self._total - self._done) / max(self.images_per_s, 1e-9)
            print(
                f"{self._what}: {self._done} of {self._total} images, {self.images_per_s:.0f} images/s, "
                f"{left_s:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    @property
    def images_per_s(self) -> float:
        return self._done / max(time.monotonic() - self._started, 1e-9)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
