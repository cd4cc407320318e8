"""Rank, world and the few collectives we use, which also work in one process without a process group."""

import os
import typing
from datetime import timedelta
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
TIMEOUT = timedelta(seconds=600)
"""How long a rank waits for the others before it takes them for dead."""
MEETING = timedelta(seconds=300)
"""The same for ranks that have not met yet; torch tries to reach rank 0 for up to two and a half times as long."""


def start(device: torch.device) -> None:
    """Join the process group that the launcher's environment describes; alone, form a group of one.

    `deepspeed`, `torchrun` and SLURM wrappers set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT;
    a bare `python -m trainer` sets none of them.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, rank, world = next(rendezvous("env://", timeout=MEETING))
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=0, world_size=1)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """The device of this process: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def rank() -> int:
    """This process's number in the job, before and after the process group exists."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world() -> int:
    """The number of processes in the job, before and after the process group exists."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes what a job writes once."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks of a tensor that has the same shape on each; a new tensor."""
    total = tensor.clone()
    if world() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over all ranks of a tensor that has the same shape on each; a new tensor."""
    return sum_over_ranks(tensor) / world()


def logsumexp_over_ranks(tensor: Tensor) -> Tensor:
    """log(sum over ranks of exp(tensor)), elementwise, of a tensor that has the same shape on each; never overflows."""
    return gather_equal_rows(tensor[None]).logsumexp(0)


def gather_rows(tensor: Tensor) -> Tensor:
    """Every rank's rows, in rank order; the ranks may hold different numbers of rows, none included.

    tensor: (N_rank, ...) with equal trailing sizes
    returns: (sum of N_rank, ...) on every rank
    """
    if world() == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    sizes = [int(count) for count in counts]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded)
    return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])


def gather_equal_rows(tensor: Tensor) -> Tensor:
    """As `gather_rows`, for ranks that all hold the same number: one collective, and no wait for the host."""
    if world() == 1:
        return tensor
    rows = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(rows, tensor.contiguous())
    return torch.cat(rows)


class _Gather(torch.autograd.Function):
    """The gradient of the mean over ranks of one common loss: this rank's rows of it, times the number of ranks."""

    @staticmethod
    def forward(ctx: typing.Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return gather_equal_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: typing.Any, gradient: Tensor) -> Tensor:
        start = rank() * ctx.num_rows
        return gradient[start : start + ctx.num_rows] * world()


def gather_for_common_loss(rows: Tensor) -> Tensor:
    """As `gather_equal_rows`, with a gradient, for losses that every rank computes alike from all ranks' rows.

    Gradients are averaged over ranks in the end, and only this rank knows its rows' part; nothing is sent backwards.
    """
    if world() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def from_main(value: T) -> T:
    """Rank 0's value, on every rank; it must pickle."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank; they must pickle."""
    if world() == 1:
        return [value]
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, value)
    return typing.cast("list[T]", values)


def true_everywhere(claim: bool) -> bool:
    """Whether the claim holds on every rank; all ranks get the same answer."""
    doubts = sum_over_ranks(torch.tensor([0 if claim else 1], device=local_device()))
    return not doubts.item()


class Agreement:
    """Claims that any rank may make and that all ranks learn one step later, at the same step.

    They travel through host memory and beside the training, so that nothing waits for the device, nor for the slowest
    rank of this step. A rank that has died is an error here, even where its absence would only hang the device.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        if world() > 1:
            self._group = typing.cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=TIMEOUT))
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def any_claims(self, *claims: bool) -> list[bool]:
        """Which of the claims any rank made in the step before; alone, what it claims now."""
        if self._group is None:
            return list(claims)
        if self._under_way is not None:
            work, made = self._under_way
            work.wait()
            self._under_way = None
            if made.any():
                return made.bool().tolist()  # and all ranks leave, with nothing under way
        mine = torch.tensor(claims, dtype=torch.int32)
        under_way = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert under_way is not None
        self._under_way = under_way, mine
        return [False] * len(claims)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, fault: type[BaseException] | None, *_: object) -> None:
        if fault is None and self._group is not None:  # after a fault other ranks may not answer any more
            if self._under_way is not None:
                self._under_way[0].wait()
            dist.destroy_process_group(self._group)
