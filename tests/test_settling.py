"""The shift of a finished network's gates: it meets the target on plain images, or says that it cannot."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.launch import DEMO, TINY
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.gates import Gates
from trainer.models.gating import gating_of
from trainer.recipe_file import load_recipe
from trainer.settling import REACH, HardCost, Settled, biases, find_shift, say, shift_gates

ARGS: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32]}
IMAGES = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def gated(target: float) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(Backbone(name="resnet18", args=ARGS, gates=Gates(target=target))).eval()


def cost_of(network: nn.Module) -> float:
    with torch.no_grad():
        return float(HardCost(network, 32)(IMAGES).double().mean())


@pytest.mark.parametrize("target", [0.6, 0.75])
def test_the_shift_that_is_found_meets_the_target(target: float) -> None:
    network = gated(target)
    as_drawn = [bias.detach().clone() for bias in biases(network)]
    before = cost_of(network)
    settled = find_shift(network, lambda: cost_of(network))
    assert settled.before == before
    assert all(torch.equal(bias, drawn) for bias, drawn in zip(biases(network), as_drawn, strict=True)), "left alone"
    shift_gates(network, settled.shift)
    assert cost_of(network) == settled.after == pytest.approx(target, abs=0.003)
    assert abs(before - target) > 0.02, "or there was nothing to do"


def test_gates_that_meet_the_target_are_not_shifted() -> None:
    network = gated(0.6)
    shift_gates(network, find_shift(network, lambda: cost_of(network)).shift)
    gating_of(network).settings = Gates(target=cost_of(network))
    assert find_shift(network, lambda: cost_of(network)).shift == 0


def test_a_target_beyond_reach_takes_the_nearest_shift() -> None:
    network = gated(0.6)
    for bias in biases(network):
        nn.init.constant_(bias, 100.0)
    settled = find_shift(network, lambda: cost_of(network))
    assert settled.before == settled.after == cost_of(network) > 1
    assert -REACH <= settled.shift <= 0


def test_a_cost_that_misses_the_target_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        say(Settled(before=0.9, after=0.9, shift=-4.0), 0.3, 100)
    assert any("budgets that can be met" in each.message for each in caplog.records if each.levelname == "WARNING")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        say(Settled(before=0.32, after=0.3, shift=-0.1), 0.3, 100)
    assert [each.levelname for each in caplog.records] == ["INFO"]


def test_a_negative_number_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"settle_images must be at least 0"):
        load_recipe(DEMO, [*TINY, "backbone.gates={target: 0.75, settle_images: -1}", f"run.dir={tmp_path}"])
