"""The mean of a teacher's outputs, which DINO and iBOT subtract."""

import torch
from torch import Tensor

from trainer import distributed


class PendingMean:
    """The mean over all rows of a step: those of every micro-batch and rank, kept aside until the step was applied."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._num_rows = 0

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take the (..., K) rows of a micro-batch."""
        self._sums.append(rows.sum(tuple(range(rows.ndim - 1)), dtype=torch.float32))
        self._num_rows += rows.shape[:-1].numel()

    @torch.no_grad()
    def mean(self) -> Tensor:
        """The (K,) mean; every rank has brought equally many rows."""
        return distributed.sum_over_ranks(torch.stack(self._sums).sum(0)) / (self._num_rows * distributed.world())

    def forget(self) -> None:
        """Start the next step."""
        self._sums, self._num_rows = [], 0
