"""LARS, and what it needs to be exact under ZeRO: the norms of whole parameters, of which each rank holds pieces."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trainer import distributed

if TYPE_CHECKING:
    from trainer.partitions import Piece


class Layers:
    """Which runs of an optimizer's tensors are which parameters.

    Without pieces every tensor is one whole parameter, the same on every rank, as at ZeRO stage 0.
    """

    def __init__(self, pieces: Iterable["Piece"] = (), names: Sequence[str] = ()) -> None:
        """Keep this rank's pieces; `names` numbers all parameters, in the same order on every rank."""
        self._num_parameters = len(names)
        numbers = {name: number for number, name in enumerate(names)}
        self._pieces: dict[Tensor, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.owner, []).append(piece)
        self._numbers = {
            owner: torch.tensor([numbers[piece.name] for piece in mine], device=owner.device)
            for owner, mine in self._pieces.items()
        }

    def runs(self, owners: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each parameter's run of the tensors, which are shaped as the optimizer's own; views."""
        if not self._num_parameters:
            return list(tensors)
        rows = zip(owners, tensors, strict=True)
        return [piece.of(tensor) for owner, tensor in rows for piece in self._pieces.get(owner, ())]

    def norms(self, owners: Sequence[Tensor], *rows: Sequence[Tensor]) -> list[Tensor]:
        """For each row of tensors, the norms of the whole parameters in the order of `runs`: (len(runs),) each.

        Under ZeRO one all-reduce of len(rows) numbers a parameter, in which every rank takes part.
        """
        runs = [self.runs(owners, row) for row in rows]
        if not self._num_parameters:
            return [torch.stack(torch._foreach_norm(row)) for row in runs]
        squares = torch.zeros(len(rows), self._num_parameters, dtype=torch.float64, device=owners[0].device)
        numbers = [self._numbers[owner] for owner in owners if owner in self._numbers]
        if not numbers:  # padding alone
            distributed.sum_over_ranks(squares)
            return [squares[0, :0].float() for _ in rows]
        mine = torch.cat(numbers)
        squares[:, mine] = torch.stack([torch.stack(torch._foreach_norm(row)) for row in runs]).double().square()
        return list(distributed.sum_over_ranks(squares)[:, mine].sqrt().float())

    def scale_(self, owners: Sequence[Tensor], tensors: Sequence[Tensor], factors: Tensor) -> None:
        """Multiply each parameter's run by its factor, in the order of `norms`."""
        if runs := self.runs(owners, tensors):
            torch._foreach_mul_(runs, list(factors.unbind()))


def clip_each_(layers: Layers, params: Sequence[Tensor], largest: float) -> None:
    """Shorten the gradient of every parameter that is longer than `largest` to that L2 norm.

    source: clip_gradients of the DINO and SSLight code, its 1e-6 included
    """
    if not params:  # ZeRO 3 hands over one group's parameters at a time
        return
    gradients: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
    (norms,) = layers.norms(params, gradients)
    layers.scale_(params, gradients, (largest / (norms + 1e-6)).clamp(max=1))


class LARS(torch.optim.Optimizer):
    """SGD with momentum and layer-wise trust ratios, those of whole parameters under every ZeRO stage.

    g <- g + wd p;  g <- g * eta |p| / |g| where the group adapts;  m <- mu m + g;  p <- p - lr m
    Under ZeRO: one all-reduce for each call of `step` (one a group, or a sub-group of stage 3) whose group adapts.
    source: arXiv 1708.03888, as SSLight utils/optimizer.py writes it
    """

    trust_coefficient: ClassVar[float] = 0.001  # eta in the paper and in SSLight

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, parameter_clipping: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "frozen": False, "adapts": True})
        self.overflow = False
        self.layers = Layers()
        self.parameter_clipping = parameter_clipping
        self.trust_ratios: dict[Tensor, Tensor] = {}
        """The newest of every tensor that adapts, one ratio for each of its runs; they stay on the device."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, in groups that are not frozen."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and not group["frozen"]:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if self.parameter_clipping:
            clip_each_(self.layers, params, self.parameter_clipping)
        gradients: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        updates = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
        if group["adapts"]:
            self._adapt(params, updates)
        buffers = [self._momentum_buffer(p) for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])

    def _adapt(self, params: Sequence[Tensor], updates: Sequence[Tensor]) -> None:
        """Scale each update by eta |p| / |g|, or by 1 where either norm is 0; no value leaves the device."""
        weight_norms, update_norms = self.layers.norms(params, params, updates)
        ratios = torch.where(
            (weight_norms > 0) & (update_norms > 0), self.trust_coefficient * weight_norms / update_norms, 1.0
        )
        self.layers.scale_(params, updates, ratios)
        counts = [len(self.layers.runs([p], [p])) for p in params]
        self.trust_ratios |= dict(zip(params, torch.split(ratios, counts), strict=True))

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer
