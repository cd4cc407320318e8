"""Parameter groups and the optimizers, which skip a frozen group as if it had no gradient; LARS is in lars.py."""

import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.lars import LARS, Layers, clip_each_
from trainer.schedules import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    """The optimizer, its schedule, and how long and in which batches it trains."""

    name: Literal["lars", "adamw"]
    epochs: int
    global_batch: int
    """Images a step over all ranks and accumulation steps."""
    accumulation: int = 1
    """Micro-batches a step; a rank's micro-batch is global_batch / (accumulation x ranks)."""
    base_lr: float
    """Learning rate for a global batch of 256; the peak is base_lr x global_batch / 256."""
    final_lr: float
    """Where the cosine ends; not scaled with the batch."""
    warmup_epochs: float
    warmup_lr: float = 0.0
    """Where the warm-up starts; not scaled with the batch."""
    weight_decay: float
    final_weight_decay: float
    """Weight decay follows half a cosine from weight_decay to this; equal values keep it constant."""
    sgd_momentum: float = 0.9
    """LARS only."""
    gradient_clipping: float = 0.0
    """Largest L2 norm of the whole gradient; 0 leaves it as it is."""
    parameter_clipping: float = 0.0
    """Largest L2 norm of each parameter's own gradient, what DINO and SSLight call clip_grad; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        for field in ("epochs", "global_batch", "accumulation", "base_lr"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        clippings = ("gradient_clipping", "parameter_clipping")
        for field in ("final_lr", "warmup_lr", "weight_decay", "final_weight_decay", *clippings):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must lie in [0, epochs = {self.epochs}), got {self.warmup_epochs}")
        if not 0 <= self.sgd_momentum < 1:
            raise ValueError(f"sgd_momentum must lie in [0, 1), got {self.sgd_momentum}")

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.base_lr * self.global_batch / 256


def param_groups(
    module: nn.Module,
    frozen_at_start: Iterable[Tensor] = (),
    gates: Iterable[Tensor] = (),
    *,
    gate_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Sort trainable parameters by how they decay and adapt; empty groups are left out.

    decay: everything else; depthwise: 4-D with one input channel, no decay, still adapted by LARS;
    vectors: biases and norms, neither; gates: neither, at a learning rate of their own; frozen: those that a method
    freezes at first, decayed like the first group.
    gate_lr_scale: the gates' learning rate over that of all others
    source: SSLight utils/param_utils.py
    """
    frozen_ids = {id(parameter) for parameter in frozen_at_start}
    gate_ids = {id(parameter) for parameter in gates}
    members: dict[str, list[nn.Parameter]] = {"decay": [], "depthwise": [], "vectors": [], "gates": [], "frozen": []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            kind = "gates" if id(parameter) in gate_ids else _kind(parameter)
            members["frozen" if id(parameter) in frozen_ids else kind].append(parameter)
    return [
        {
            "params": params,
            "name": name,
            "decays": name in ("decay", "frozen"),
            "adapts": name not in ("vectors", "gates"),
            "lr_scale": gate_lr_scale if name == "gates" else 1.0,
        }
        for name, params in members.items()
        if params
    ]


def _kind(parameter: Tensor) -> str:
    if parameter.ndim <= 1:
        return "vectors"
    return "depthwise" if parameter.ndim == 4 and parameter.shape[1] == 1 else "decay"


def build_optimizer(optim: Optim, groups: list[dict[str, Any]]) -> "AdamW | LARS":
    """The recipe's optimizer over the groups; `set_progress` gives it each step's values."""
    for group in groups:
        group["frozen"] = False
    if optim.name == "lars":
        return LARS(groups, lr=0.0, momentum=optim.sgd_momentum, parameter_clipping=optim.parameter_clipping)
    return AdamW(groups, lr=0.0, weight_decay=0.0, fused=True, parameter_clipping=optim.parameter_clipping)


def set_progress(optimizer: torch.optim.Optimizer, progress: Progress, *, frozen: bool) -> None:
    """Give every group this step's learning rate and weight decay, and freeze or thaw the group `frozen`."""
    for group in optimizer.param_groups:
        group["lr"] = progress.lr * group["lr_scale"]
        group["weight_decay"] = progress.weight_decay if group["decays"] else 0.0
        group["frozen"] = frozen and group["name"] == "frozen"


@contextmanager
def _thawed_groups_only(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Hide frozen groups: a zero gradient would still decay weights and age Adam's bias correction."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if not group["frozen"]]
    try:
        yield
    finally:
        optimizer.param_groups = groups


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, which leaves frozen groups and their state untouched."""

    def __init__(self, groups: list[dict[str, Any]], *, parameter_clipping: float = 0.0, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._step_supports_amp_scaling = False  # a loss scaler shall divide before us, as gradients may be clipped
        self.overflow = False
        self.layers = Layers()
        self.parameter_clipping = parameter_clipping

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every group that is not frozen."""
        with _thawed_groups_only(self):
            for group in self.param_groups if self.parameter_clipping else ():
                clip_each_(self.layers, [p for p in group["params"] if p.grad is not None], self.parameter_clipping)
            return typing.cast("float | None", super().step(closure))
