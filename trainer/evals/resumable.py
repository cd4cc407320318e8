"""An evaluation that trains for hours and was stopped goes on where it was."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import distributed
from trainer.metrics import clock

log = logging.getLogger(__name__)


class Resumable:
    """What a training of an evaluation leaves behind in one file; every rank holds the same, so rank 0 writes it."""

    def __init__(self, path: Path, identity: str) -> None:
        """identity: everything that the training depends on; a file with another one is of no use."""
        self.path, self._identity = path, identity
        self._module: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[Any]]:
        """Put back what the file holds; returns the next step and what was measured, (0, []) if there is no file."""
        self._module, self._optimizer = module, optimizer
        if not distributed.true_everywhere(self.path.is_file()):
            return 0, []
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["identity"] != self._identity:
            log.warning("%s belongs to an evaluation with other settings; starting this one anew", self.path)
            return 0, []
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        log.info("continuing %s after %d", self.path.stem.lstrip("."), state["step"])
        return int(state["step"]), list(state["scores"])

    def save(self, step: int, scores: list[Any]) -> None:
        """Write the file whole or not at all."""
        assert self._module is not None
        assert self._optimizer is not None
        if not distributed.is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        state = {"identity": self._identity, "step": step, "scores": scores}
        state |= {"module": self._module.state_dict(), "optimizer": self._optimizer.state_dict()}
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def eta(first: int, total: int) -> Callable[[int], str]:
    """A clock that says after each step how long the rest takes."""
    started = time.monotonic()

    def left(step: int) -> str:
        return clock((time.monotonic() - started) / (step + 1 - first) * (total - step - 1))

    return left
