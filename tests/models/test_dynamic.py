"""Execution image by image: what is computed is what gates open, and nothing else changes."""

import pytest
import torch
from torch import nn

from tests.models.test_gating import NETWORKS, images, plain
from tests.models.test_slicing import TOLERANCE, trained
from trainer.models.dynamic import OpenConvolution, dynamic_network
from trainer.models.gating import cost_at, gated_pass


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_a_dynamic_network_says_what_hard_gates_say_of_each_image(kind: str) -> None:
    network = trained(kind)
    dynamic = dynamic_network(network)
    for image in images(6).split(1):
        masked = gated_pass(network, image, "hard").features
        assert (dynamic(image) - masked).abs().max() <= TOLERANCE * masked.abs().max()
    assert (dynamic(image) - network(image)).abs().max() > 0.01, "and not what the dense one says"


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_a_dynamic_network_computes_what_its_budget_counts(kind: str) -> None:
    network = trained(kind)
    dynamic, macs = dynamic_network(network), []

    def count(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        depth_wise = getattr(layer, "depth_wise", False) or getattr(layer, "groups", 1) > 1
        inputs = 1 if depth_wise else args[0].shape[1]
        macs.append(output[0].numel() * inputs * weight.shape[-1] * weight.shape[-2])

    for module in dynamic.modules():
        if isinstance(module, OpenConvolution | nn.Conv2d):
            module.register_forward_hook(count)
    dynamic(images(1))
    opened = [opening.mask.sum() for opening in gated_pass(network, images(1), "hard").openings]
    assert sum(macs) == int(cost_at(network, images().shape[-1]).open_macs(torch.stack(opened)))


def test_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="one at a time, got 2"):
        dynamic_network(trained("basic"))(images(2))


def test_a_network_without_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="no gates"):
        dynamic_network(plain("basic"))
