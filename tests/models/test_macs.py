"""Costs of gated networks against figures known from the paper, its code, and torch's own counter of operations."""

from functools import cache

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.models.gates import Gates
from trainer.models.gating import add_gates, cost_at, gates_of
from trainer.models.macs import Convolution, Cost, cost, uniform_density


@cache
def gated(name: str, stem_padding: int | None = None) -> nn.Module:
    """A gated timm network without data; with stem_padding, CIFAR's stem: 3 x 3, stride 1, no pooling."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
        if stem_padding is not None:
            network.conv1 = nn.Conv2d(3, 64, 3, padding=stem_padding, bias=False)
            network.maxpool = nn.Identity()
    add_gates(network, Gates(target=0.5))
    return network


def cost_of(name: str, size: int, stem_padding: int | None = None) -> Cost:
    return cost_at(gated(name, stem_padding), size)


def at_density(found: Cost, density: float) -> float:
    return float(found.ratio(torch.tensor(found.widths, dtype=torch.float64) * density))


@pytest.mark.parametrize(
    ("name", "size", "stem_padding", "dense", "of_gates"),
    [
        ("resnet18", 32, 2, 703_560_448, 240_640),
        ("resnet18", 32, 1, 555_417_600, 240_640),
        ("resnet18", 64, None, 148_045_824, 240_640),
        ("resnet18", 96, None, 333_103_104, 240_640),
        ("resnet18", 224, None, 1_813_561_344, 240_640),
        ("resnet34", 32, 1, 1_159_397_376, 521_216),
        ("resnet34", 224, None, 3_663_249_408, 521_216),
        ("resnet50", 224, None, 4_087_136_256, 10_129_408),
        ("mobilenetv2_100", 224, None, 299_494_272, 220_416),  # its gates are at least 8 wide: 1,120 more
    ],
)
def test_the_dense_cost_is_the_published_one(
    name: str, size: int, stem_padding: int | None, dense: int, of_gates: int
) -> None:
    found = cost_of(name, size, stem_padding)
    assert (found.dense, found.gate_macs) == (dense, of_gates)


@pytest.mark.parametrize(
    ("name", "size", "stem_padding", "ratios"),
    [
        ("resnet18", 32, 2, [0.01497626, 0.11351284, 0.31058599, 0.50765915, 1.00034203]),
        ("resnet18", 32, 1, [0.01494653, 0.11349521, 0.31059255, 0.50768990, 1.00043326]),
        ("resnet18", 96, None, [0.07641963, 0.16884991, 0.35371047, 0.53857102, 1.00072242]),
        ("resnet18", 224, None, [0.07582990, 0.16826018, 0.35312074, 0.53798129, 1.00013269]),
        ("resnet34", 224, None, [0.03761763, 0.13387009, 0.32637502, 0.51887996, 1.00014228]),
        ("resnet50", 224, None, [0.119351, None, 0.289251, 0.447774, 1.002478]),
        ("mobilenetv2_100", 224, None, [0.1374, None, None, 0.5691, None]),
    ],
)
def test_the_ratio_at_a_uniform_density_is_the_published_one(
    name: str, size: int, stem_padding: int | None, ratios: list[float | None]
) -> None:
    found = cost_of(name, size, stem_padding)
    for density, ratio in zip((0, 0.1, 0.3, 0.5, 1), ratios, strict=True):
        if ratio is not None:
            digits = 6e-5 if name == "mobilenetv2_100" else 6e-7 if name == "resnet50" else 6e-9
            assert at_density(found, density) == pytest.approx(ratio, abs=digits)


@pytest.mark.parametrize(
    ("size", "stem_padding", "densities"),
    [
        (32, 2, [0.086286, 0.187772, 0.289257, 0.390742, 0.492227]),
        (96, None, [0.025512, 0.133701, 0.241891, 0.350080, 0.458270]),
        (224, None, [0.026150, 0.134339, 0.242529, 0.350719, 0.458908]),
    ],
)
def test_the_density_that_meets_a_target_is_the_published_one(
    size: int, stem_padding: int | None, densities: list[float]
) -> None:
    found = cost_of("resnet18", size, stem_padding)
    for target, density in zip((0.1, 0.2, 0.3, 0.4, 0.5), densities, strict=True):
        assert uniform_density(found, target) == pytest.approx(density, abs=6e-7)


def test_a_target_below_the_networks_floor_has_no_density() -> None:
    with pytest.raises(ValueError, match=r"0\.0758, 1\.0001"):
        uniform_density(cost_of("resnet18", 224), 0.05)


def test_an_open_channel_costs_what_is_published_for_each_block() -> None:
    found = cost_of("resnet18", 32, 1)
    per_channel = {term.gates: term.macs for term in found.terms if term.gates}
    expected = [1_179_648, 1_179_648, 442_368, 589_824, 221_184, 294_912, 110_592, 147_456]
    assert per_channel == {(gate,): macs for gate, macs in enumerate(expected)}
    assert per_channel[(0,)] * 64 == 37_748_736 * 2, "a whole block is its two convolutions"


def test_images_with_different_counts_cost_what_is_published() -> None:
    found = cost_of("resnet18", 32, 1)
    thin = [16, 16, 32, 32, 64, 64, 128, 128]
    both = torch.tensor([thin, [3 * count for count in thin]])
    ratios = found.ratio(both)
    assert ratios.tolist() == pytest.approx([0.26131822, 0.75406158], abs=6e-9)
    assert (found.open_macs(both) + found.gate_macs).tolist() == [145_140_736, 418_819_072], "to the last operation"
    assert ratios.mean().item() == pytest.approx(0.50768990, abs=6e-9)
    assert found.floor * found.dense == pytest.approx(12_467_200)


def test_a_gates_parameters_are_as_many_as_published() -> None:
    for name, expected in (("resnet18", 241_376), ("resnet34", 522_880), ("mobilenetv2_100", 221_024)):
        gates = gates_of(gated(name))
        without_bias = sum(p.numel() for gate in gates for p in gate.parameters()) - sum(g.num_channels for g in gates)
        assert without_bias == expected, name


def test_resnet50s_two_gates_meet_in_a_product() -> None:
    found = cost_of("resnet50", 224)
    assert [term.gates for term in found.terms if len(term.gates) == 2] == [(g, g + 1) for g in range(0, 32, 2)]


WIDTHS = (8, 6, 4)
CHAIN = cost(
    [
        Convolution(3, 5, 9, 64),
        Convolution(5, 8, 9, 64, out_gate=0),
        Convolution(8, 6, 9, 16, in_gate=0, out_gate=1),
        Convolution(6, 4, 1, 16, in_gate=1),
        Convolution(4, 4, 1, 16, out_gate=2),
        Convolution(4, 4, 9, 4, groups=4, in_gate=2, out_gate=2),
        Convolution(4, 7, 1, 4, in_gate=2),
    ],
    WIDTHS,
    gate_macs=10,
)


@settings(max_examples=50, deadline=None)
@given(counts=st.tuples(*(st.integers(0, width) for width in WIDTHS)))
def test_the_cost_is_that_of_convolutions_of_the_open_channels_alone(counts: tuple[int, int, int]) -> None:
    a, b, c = counts
    smaller = [(3, 5, 9, 64), (5, a, 9, 64), (a, b, 9, 16), (b, 4, 1, 16), (4, c, 1, 16), (1, c, 9, 4), (c, 7, 1, 4)]
    assert int(CHAIN.open_macs(torch.tensor(counts))) == sum(i * o * taps * n for i, o, taps, n in smaller)


@settings(max_examples=50, deadline=None)
@given(counts=st.tuples(*(st.integers(0, width - 1) for width in WIDTHS)), gate=st.integers(0, 2))
def test_one_more_open_channel_never_costs_less(counts: tuple[int, ...], gate: int) -> None:
    more = [count + (g == gate) for g, count in enumerate(counts)]
    assert CHAIN.ratio(torch.tensor(more)) >= CHAIN.ratio(torch.tensor(counts))
