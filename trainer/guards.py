"""What ends a run that must not go on: a loss that is not finite, steps that are all skipped, one that never ends."""

import faulthandler
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer import distributed

MAX_SKIPPED = 50
"""Steps skipped in a row; a loss scale that starts at 2^16 has found its place after 16."""


class TrainingError(RuntimeError):
    """Training that must not go on."""


class FiniteGuard:
    """Notes on the device which step was the first that was not finite, and where that began; waits for nothing.

    A loss that is not finite reaches every weight with the next update, so only the first step tells the cause.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # step or -1, then one flag each: loss, teacher, every student pass
        self._skipped = 0

    @torch.no_grad()
    def see(self, step: int, loss: Tensor, passes_finite: Tensor, teacher_output: Tensor | None) -> None:
        """Take one micro-batch.

        passes_finite: (P,) whether all features of each of the student's passes are finite
        """
        teacher = torch.ones_like(passes_finite[0]) if teacher_output is None else teacher_output.isfinite().all()
        flags = torch.cat([loss.detach().isfinite().view(1), teacher.view(1), passes_finite])
        number = torch.full((1,), step, device=flags.device)
        if self._first is None:
            self._first = torch.full((1 + len(flags),), -1, device=flags.device)
        is_first = (self._first[0] < 0) & ~flags.all()
        self._first = torch.where(is_first, torch.cat([number, flags.long()]), self._first)

    def count(self, *, applied: bool) -> None:
        """Take note of a step that was applied or skipped. raises: TrainingError after MAX_SKIPPED of the latter."""
        self._skipped = 0 if applied else self._skipped + 1
        if self._skipped == MAX_SKIPPED:
            raise TrainingError(
                f"the last {MAX_SKIPPED} steps were skipped, since their gradients were not finite whatever the loss "
                "scale; the last checkpoint is sound. Lower optim.base_lr, or train in bfloat16 or fp32"
            )

    def check(self, record: Mapping[str, object]) -> None:
        """End the run on all ranks at once, before a checkpoint keeps the damage.

        record: the means over ranks that are about to be written
        raises: TrainingError with the first step, the rank and the likely cause
        """
        broken = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        rows = [] if self._first is None else distributed.gather_equal_rows(self._first[None]).tolist()
        found = [(row[0], rank, row[1:]) for rank, row in enumerate(rows) if row[0] >= 0]
        if found:
            raise TrainingError(_describe(*min(found)))
        if broken:
            raise TrainingError(f"{', '.join(broken)} not finite at or before step {record['step']}. {_REMEDY}")


_REMEDY = (
    "The last checkpoint is sound. Lower optim.base_lr, lengthen optim.warmup_epochs, or set optim.gradient_clipping"
)
_PASSES = "one for each view that the student sees, in their order; of a gated network the dense ones, then the gated"


def _describe(step: int, rank: int, flags: list[int]) -> str:
    """The first step that was not finite, and what its flags say about the cause."""
    _, teacher, *passes = flags
    bad = [number for number, is_finite in enumerate(passes) if not is_finite]
    if bad and len(bad) < len(passes):
        which = f"{', '.join(map(str, bad))} of 0 to {len(passes) - 1}"
        where = f"the features of the student's pass {which} are not finite ({_PASSES})"
        cause = f"so it is their views, or their gates, that overflow; look at the views with `trainer show`. {_REMEDY}"
    elif bad:
        where = "the features of every pass are not finite"
        cause = f"so the weights are not: the update before this step diverged. {_REMEDY}"
    elif not teacher:
        where, cause = "the teacher's output is not finite, the student's features are", _REMEDY
    else:
        where = "the loss is not finite, the features are"
        cause = f"so it overflows in the head or in the loss: raise its temperature. {_REMEDY}"
    return f"step {step}, rank {rank}: {where}, {cause}"


@contextmanager
def watchdog(timeout_s: float) -> Iterator["Watchdog"]:
    """End this process, with every thread's traceback, if nothing is heard for so long; the launcher ends the rest."""
    dog = Watchdog(timeout_s)
    dog.heard()
    try:
        yield dog
    finally:
        dog.rest()


class Watchdog:
    """A timer of the interpreter's own, which runs where Python does not: in a collective that never returns."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def heard(self) -> None:
        """Start counting anew."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.__stderr__ or sys.stderr)

    def rest(self) -> None:
        """Count nothing until `heard`."""
        faulthandler.cancel_dump_traceback_later()
