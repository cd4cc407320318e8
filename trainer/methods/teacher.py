"""The second branch: a running average of the student, kept in fp32 outside the engine."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.models.backbones import Branch, stop_stochastic_depth


@dataclass(frozen=True, kw_only=True, slots=True)
class EMA:
    """A teacher that follows the student: t <- m t + (1 - m) s after every step, m rising by half a cosine."""

    kind: Literal["ema"]
    momentum: float
    """m at step 0."""
    final_momentum: float
    """m at the end; equal to momentum for a constant one."""

    def __post_init__(self) -> None:
        for field in ("momentum", "final_momentum"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must lie in [0, 1], got {getattr(self, field)}")


class EMATeacher(nn.Module):
    """A copy of the student at first; its parameters follow, its BatchNorm statistics are those of its own input.

    It drops no paths, however many the student drops.

    It stays outside the wrapped module, so that neither ZeRO shards it nor reduced precision stalls it: in bf16,
    1 - m = 0.0005 is below half a unit in the last place and most entries never move.
    source: SSLight model/dino.py (train mode, parameters averaged, buffers not)
    """

    def __init__(self, student: Branch) -> None:
        super().__init__()
        self.branch = copy.deepcopy(student).float().requires_grad_(False)
        stop_stochastic_depth(self.branch)

    @torch.no_grad()
    def forward(self, views: list[Tensor]) -> Tensor:
        """The branch's head output for the views, (sum of V_i * B, D), without gradient."""
        output: Tensor = self.branch(views)
        return output

    @torch.no_grad()
    def follow(self, student: Branch, momentum: float) -> None:
        """t <- momentum t + (1 - momentum) s for every parameter, in one fused update."""
        mine: list[Tensor] = list(self.branch.parameters())
        theirs = [parameter.detach().float() for parameter in student.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
