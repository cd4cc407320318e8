"""Which views a student sees in which mode, and what its gates cost there.

Legend: B images, V views of an image, P passes.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer.methods.budget import Budget, Spent, density_for, spent
from trainer.models.backbones import Branch
from trainer.models.gates import Mode
from trainer.models.gating import cost_at, gating_of, in_mode, is_gated
from trainer.schedules import Progress

Kind = Literal["global", "local"]


class Group(NamedTuple):
    """Views of one kind that pass the backbone in one mode."""

    mode: Mode
    kind: Kind
    views: tuple[int, ...]


class Bill(NamedTuple):
    """What a gated pass cost."""

    kind: Kind
    spent: Spent
    density: float
    """The share of open channels, the same in all gates, that would have met the target on views of this size."""


class Passed(NamedTuple):
    """What a student made of a micro-batch's views."""

    features: Tensor
    """(P * B, embed_dim)."""
    outputs: Any
    """What the method's objective gets of them; (P, B, D) if the method has no more to say."""
    bills: Sequence[Bill] = ()


def pairs_of(backbone: nn.Module) -> str | None:
    """The recipe's `pairs`; None for a network without gates."""
    return gating_of(backbone).settings.pairs if is_gated(backbone) else None


def groups_for(
    pairs: str | None, counts: tuple[int, int], *, num_unseen: int = 0, num_dense: int = 0
) -> tuple[Group, ...]:
    """The passes of a step, dense ones first; all are dense if there are no gates.

    cross: of each kind every second view passes gated, the first among them, and the others dense; cross_symmetric:
    global views pass both ways; full: all do. A kind's only view always does, so that both networks see each kind.

    counts: global and local views;  num_unseen: how many of the first the student does not see
    num_dense: how many of the first pass dense whatever the rule says
    """
    num_globals, num_views = counts[0], sum(counts)
    views: dict[Kind, range] = {"global": range(num_unseen, num_globals), "local": range(num_globals, num_views)}
    if pairs is None:
        return tuple(Group("dense", kind, tuple(of_kind)) for kind, of_kind in views.items() if of_kind)
    both_ways = {"global": pairs != "cross", "local": pairs == "full"}

    def passing(mode: Mode, kind: Kind) -> tuple[int, ...]:
        of_kind = views[kind]
        if both_ways[kind] or len(of_kind) == 1:
            return tuple(of_kind)
        chosen = of_kind[::2] if mode == "sampled" else {*of_kind[1::2], *range(num_dense)}
        return tuple(view for view in of_kind if view in chosen)

    modes: tuple[Mode, ...] = ("dense", "sampled")
    every = (Group(mode, kind, passing(mode, kind)) for mode in modes for kind in views)
    return tuple(group for group in every if group.views)


def pass_backbone(backbone: nn.Module, images: Tensor, group: Group) -> tuple[Tensor, list[Bill]]:
    """Features of (N, 3, S, S) images in a group's mode, and the bill if gates were asked."""
    if group.mode == "dense":
        return backbone(images), []
    with in_mode(backbone, group.mode) as openings:
        features: Tensor = backbone(images)
    size = images.shape[-1]
    return features, [Bill(group.kind, spent(openings, cost_at(backbone, size)), density_for(backbone, size))]


def pass_gated(student: Branch, each: Sequence[Tensor], groups: Sequence[Group]) -> Passed:
    """All groups through a gated student: batch statistics are a group's in the backbone, and a mode's in the head.

    each: (B, 3, S_v, S_v) of every view
    """
    features: dict[Mode, list[Tensor]] = {}
    bills: list[Bill] = []
    for group in groups:
        of_group, cost = pass_backbone(student.backbone, torch.cat([each[view] for view in group.views]), group)
        features.setdefault(group.mode, []).append(of_group)
        bills += cost
    of_modes = [torch.cat(parts) for parts in features.values()]
    outputs = torch.cat([student.head(of_mode) for of_mode in of_modes])
    return Passed(torch.cat(of_modes), outputs.view(-1, len(each[0]), *outputs.shape[1:]), bills)


class Budgets(nn.ModuleDict):
    """A budget for each kind of view that passes gated, since views of another size have another cost.

    Without gates there is none, and nothing here does anything.
    """

    def __init__(self, backbone: nn.Module, groups: Sequence[Group]) -> None:
        super().__init__({group.kind: Budget(backbone) for group in groups if group.mode != "dense"})

    def loss(self, bills: Sequence[Bill], progress: Progress) -> tuple[Tensor | float, dict[str, Tensor | float]]:
        """The sum of all budgets' penalties, and what to log: `gates/...`, and of local views `gates/local_...`."""
        total: Tensor | float = 0.0
        parts: dict[str, Tensor | float] = {}
        for kind, budget in self.items():
            mine = [bill for bill in bills if bill.kind == kind]
            assert isinstance(budget, Budget)
            penalty, of_kind = budget.loss([bill.spent for bill in mine], mine[0].density, progress)
            total = total + penalty
            prefix = "gates/" if kind == "global" else "gates/local_"
            parts |= {name.replace("gates/", prefix): value for name, value in of_kind.items()}
        return total, parts

    def after_step(self, *, applied: bool) -> None:
        """Move every budget's multiplier."""
        for budget in self.values():
            assert isinstance(budget, Budget)
            budget.after_step(applied=applied)
