"""Stop requests: SIGTERM and SIGUSR1 ask a job to save a checkpoint and to leave with a code for `start me again`.

Any one rank may get the signal; all stop after the same step. What the launchers make of it (seen: LOG.md):

    to a worker                  all save; the `deepspeed` command exits with 75, torchrun with 1
    SIGTERM to torchrun          it passes it on, and kills after 30 s: a step and a save must take less; exit 1
    SIGTERM to launch.py         the same, one rank after the other
    SIGUSR1 to either            it dies of it, and its workers save as below
    to the `deepspeed` command   on one host it dies alone, as it has no handler (read in its source)
    to `trainer.launch`          both are SIGTERM to launch.py; exit 1

A worker whose launcher has died gets SIGTERM from the kernel, so it saves and leaves too, instead of training on
unseen. The `deepspeed` runner exits with 0 when launch.py was killed, `trainer.launch` with 137; whether a run has
reached its end, the file `finished` in its run directory tells in any case.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: not done, try again later; no code of Python or the launchers is the same."""
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was asked to stop; further signals change nothing."""

    def __init__(self) -> None:
        self.came = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the signals, in the main thread only, as Python wants it; afterwards put back what was in their place.

    Once one came, the process is about to leave, and a further one must not change the code that it leaves with.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request._note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if request.came else handler)


def follow_launcher() -> None:
    """Let the kernel send SIGTERM to this process when the launcher that started it dies; Linux only.

    A process without a launcher is left alone: it may well outlive the shell that it was started from.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
