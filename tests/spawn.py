"""Runs a function on several gloo ranks; the failing rank's traceback becomes the test's."""

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")  # CUDA survives no fork
if not torch.cuda.is_available():
    CONTEXT.set_forkserver_preload(["tests.preloaded"])


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(function: Callable[..., Any], *args: Any, world: int = 2, timeout_s: float = 300) -> list[Any]:
    """Call function(*args) on every rank of a fresh gloo group; returns each rank's result, in rank order.

    function: importable by name, since ranks are processes of their own; its result must pickle
    raises: AssertionError with the traceback of the first rank that failed, or after timeout_s
    """
    results: Any = CONTEXT.Queue()
    port = free_port()
    ranks = [CONTEXT.Process(target=_rank, args=(r, world, port, results, function, args)) for r in range(world)]
    for process in ranks:
        process.start()
    try:
        return _collect(results, world, timeout_s)
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(results: Any, world: int, timeout_s: float) -> list[Any]:
    outcomes: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(outcomes) < world:
        try:
            rank, fault, value = pickle.loads(results.get(timeout=max(0.1, deadline - time.monotonic())))
        except queue.Empty:
            raise AssertionError(f"ranks {set(range(world)) - set(outcomes)} gave nothing in {timeout_s} s") from None
        assert fault is None, f"rank {rank} failed:\n{fault}"
        outcomes[rank] = value
    return [outcomes[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, results: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo")
        results.put(pickle.dumps((rank, None, function(*args))))  # here: a queue's own would share tensors' memory
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put(pickle.dumps((rank, traceback.format_exc(), None)))
        raise
