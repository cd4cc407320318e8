"""After the last step of a gated run: one shift of all gates' biases, so that plain images cost what the budget says.

Training meets the target on augmented views, with each batch's own statistics. What is deployed sees plain images with
running statistics, and its gates opened up to 2.2 points more there (LOG.md).
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.assemble import Assembly, readable
from trainer.engine import rewriting
from trainer.evals.features import reader_of
from trainer.models.gating import cost_at, counts, gated_pass, gates_of, gating_of
from trainer.recipe import Recipe

log = logging.getLogger(__name__)
REACH = 4.0
"""The largest shift, of logits."""
HALVINGS = 12
NEAR = 0.0005
"""A share of the dense network's multiply-accumulates that is not worth another pass over the images."""


class Settled(NamedTuple):
    """What a shift did to the cost of hard gates on plain images, over the dense network's."""

    before: float
    after: float
    shift: float


class HardCost(nn.Module):
    """A gated network as what it costs with hard gates: (B, 3, S, S) -> (B, 1), over the dense network's cost."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.cost = network, cost_at(network, size)
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        """One pass with hard gates."""
        openings = gated_pass(self.network, images, "hard").openings
        return self.cost.ratio(counts(openings, hard=True)).float()[:, None]


def settle(recipe: Recipe, run: Assembly, device: torch.device) -> dict[str, float]:
    """Shift the gates of a gated student once, and say under the names of metrics.jsonl what that did.

    All ranks must call it. Does nothing for a network without gates, or with backbone.gates.settle_images of 0.
    """
    gates = recipe.backbone.gates
    if gates is None or gates.settle_images == 0:
        return {}
    ids = run.loader.sample_ids
    chosen = np.unique(np.linspace(0, len(ids) - 1, gates.settle_images).round().astype(int))
    reader = replace(reader_of(recipe, device), on_bad_image=recipe.data.on_bad_image)
    plain = HardCost(readable(run).student.backbone, reader.size)

    def measure() -> float:
        costs = reader.features({"cost": plain}, recipe.data.train, ids[chosen].tolist())["cost"].vectors
        return float(costs.double().mean())

    settled = find_shift(plain.network, measure)
    backbone = run.method.student.backbone
    with rewriting(run.engine, biases(backbone)):
        shift_gates(backbone, settled.shift)
    say(settled, gating_of(backbone).settings.target, len(chosen))
    return {f"gates/plain_{key}": value for key, value in settled._asdict().items()}


def find_shift(network: nn.Module, measure: Callable[[], float]) -> Settled:
    """The shift, in halvings of [-4, 4], after which `measure` is nearest to the target; the gates stay as they are.

    measure: the cost of the network's hard gates as they are when it is called, which grows with the shift
    """
    target, kept = gating_of(network).settings.target, [bias.detach().clone() for bias in biases(network)]
    low, high = -REACH, REACH
    tried: dict[float, float] = {}
    while len(tried) < HALVINGS:
        shift = (low + high) / 2
        shift_gates(network, shift)
        tried[shift] = measure()
        restore(network, kept)
        if abs(tried[shift] - target) < NEAR:
            break
        low, high = (shift, high) if tried[shift] < target else (low, shift)
    best = min(tried, key=lambda each: abs(tried[each] - target))
    return Settled(before=tried[0.0], after=tried[best], shift=best)


def biases(network: nn.Module) -> list[nn.Parameter]:
    """Of the logits, a gate each."""
    return [gate.expand.bias for gate in gates_of(network)]


@torch.no_grad()
def shift_gates(network: nn.Module, shift: float) -> None:
    """Add the same to every logit of every gate."""
    for bias in biases(network):
        bias.add_(shift)


@torch.no_grad()
def restore(network: nn.Module, kept: list[Tensor]) -> None:
    """Put biases back."""
    for bias, value in zip(biases(network), kept, strict=True):
        bias.copy_(value)


def say(settled: Settled, target: float, num_images: int) -> None:
    """On rank 0: what was done, and a warning if the target is missed by over a point."""
    if not distributed.is_main():
        return
    log.info(
        "hard gates cost %.2f %% of the dense network on %d plain images; shifted by %+.3f they cost %.2f %%, of a "
        "target of %.2f %%", 100 * settled.before, num_images, settled.shift, 100 * settled.after, 100 * target,
    )  # fmt: skip
    if abs(settled.after - target) > 0.01:
        log.warning(
            "no common shift within %g brings hard gates to backbone.gates.target; train for longer, or see "
            "docs/gating.md for budgets that can be met", REACH,
        )  # fmt: skip
