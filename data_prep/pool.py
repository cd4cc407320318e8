"""Work for several processes whose results come back in order, with a bound on what is in flight."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

IN_FLIGHT = 4
"""Tasks a worker: enough that a slow image holds nobody up, few enough to bound memory."""


class WorkerDiedError(RuntimeError):
    """A worker process ended without a word."""


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    preload: str,
    start: Callable[..., None],
    start_args: tuple[Any, ...] = (),
) -> Generator[Result]:
    """Results of function(task) in the order of the tasks, whatever the number of workers.

    preload: module that the workers need, loaded once for all of them
    start: called in every worker first, with start_args
    raises: WorkerDiedError when a worker is killed; what function raises, otherwise
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (lifeline, start, start_args))
    submitter = ThreadPoolExecutor(1)
    waiting: deque[Future[Result]] = deque()

    def submit(task: Task) -> Future[Result]:
        """In a thread of its own: a signal's exception must not break into the start of a process."""
        return submitter.submit(pool.submit, function, task).result()

    try:
        remaining = iter(tasks)
        waiting.extend(submit(task) for task in itertools.islice(remaining, workers * IN_FLIGHT))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(submit(task) for task in itertools.islice(remaining, 1))
            yield result
    except BrokenProcessPool as error:
        raise WorkerDiedError("a worker process was killed, perhaps for want of memory; try fewer --workers") from error
    except BaseException:
        held.close()  # nobody wants the rest: the workers end now, not after the images they have in hand
        raise
    finally:
        submitter.shutdown(wait=True, cancel_futures=True)
        pool.shutdown(wait=True, cancel_futures=True)
        held.close()
        lifeline.close()


def split_evenly(items: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    """Consecutive chunks of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _start_worker(lifeline: Connection, start: Callable[..., None], start_args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a Ctrl-C ends the work
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    start(*start_args)


def _end_with_parent(lifeline: Connection) -> None:
    """End when the parent lets go, be it by its own death: the task queue alone would keep a worker waiting."""
    wait([lifeline])
    os._exit(1)
