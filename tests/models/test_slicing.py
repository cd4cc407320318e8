"""From gated to small: the sliced network is the masked one, and the rules that choose channels keep their word."""

import pytest
import torch
from torch import Tensor, nn

from tests.models.test_gating import NETWORKS, SIZE, gated, images, plain
from trainer.models.gating import cost_at, gated_pass, gates_of, in_mode
from trainer.models.slicing import (
    at_least,
    calibrate,
    first_channels,
    measure_norms,
    narrow,
    norms_behind_gates,
    open_rates,
    slice_network,
    widths,
    within_budget,
)

TOLERANCE = 1e-5


def trained(kind: str) -> nn.Module:
    """A gated network whose two sets of norms have seen different things."""
    network = gated(kind).train()
    for seed in range(3):
        gated_pass(network, images(8, seed), "sampled")
        network(images(8, seed + 10))
    return network.eval()


def some_masks(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = {
        gate.name: (torch.rand(gate.num_channels, generator=generator) < 0.4).float() for gate in gates_of(network)
    }
    for mask in masks.values():
        mask[0] = 1
    return masks


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_sliced_network_says_what_the_masked_one_says(kind: str) -> None:
    network, masks = trained(kind), some_masks(trained(kind))
    sliced = slice_network(network, plain(kind), masks)
    with in_mode(network, "static", masks):
        masked = network(images())
    assert (sliced(images()) - masked).abs().max() <= TOLERANCE * masked.abs().max()
    assert (sliced(images()) - network(images())).abs().max() > 0.01, "and not what the dense one says"


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_sliced_network_costs_what_its_open_channels_cost(kind: str) -> None:
    network, masks = trained(kind), some_masks(trained(kind))
    sliced, macs = slice_network(network, plain(kind), masks), []

    def count(conv: nn.Conv2d, _: object, output: Tensor) -> None:
        macs.append(conv.weight.numel() * output.shape[-1] * output.shape[-2])

    for module in sliced.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    sliced(images(1))
    assert sum(macs) == int(cost_at(network, SIZE).open_macs(torch.tensor(list(widths(masks).values()))))


def test_slicing_leaves_both_networks_as_they_were() -> None:
    network, original = trained("basic"), plain("basic")
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in (network, original)]
    slice_network(network, original, some_masks(network))
    for net, state in zip((network, original), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_a_sliced_networks_weights_fit_a_plain_network_made_from_its_widths() -> None:
    network = trained("inverted")
    masks = some_masks(network)
    sliced, again = slice_network(network, plain("inverted"), masks), plain("inverted").eval()
    narrow(again, first_channels(again, widths(masks)))
    again.load_state_dict(sliced.state_dict())
    assert torch.equal(again(images()), sliced(images()))
    with pytest.raises(ValueError, match="are not of this network"):
        first_channels(plain("basic"), widths(masks))


def test_open_rates_are_the_shares_of_images_over_all_batches() -> None:
    network = trained("basic")
    rates = open_rates(network, [images(5, 1), images(3, 2)])
    openings = gated_pass(network, torch.cat([images(5, 1), images(3, 2)]), "hard").openings
    for rate, opening in zip(rates.values(), openings, strict=True):
        assert torch.allclose(rate, opening.mask.double().mean(0))
    with pytest.raises(ValueError, match="at least one image"):
        open_rates(network, [])


def test_dropping_what_never_opens_changes_no_hard_output_on_the_same_images() -> None:
    """Only while the rest is still masked image by image, hence hard gates with the never-open weights destroyed."""
    network = trained("basic")
    before = gated_pass(network, images(), "hard").features
    for name, mask in at_least(open_rates(network, [images()]), 1e-9).items():
        with torch.no_grad():
            network.get_parameter(f"{name}.weight")[mask == 0] = 1e3
    assert torch.allclose(gated_pass(network, images(), "hard").features, before, atol=1e-5)


RATES = {"a": torch.tensor([0.9, 0.1, 0.5, 0.0]), "b": torch.tensor([0.2, 0.3, 0.1])}


def test_a_threshold_keeps_what_is_open_as_often_and_the_best_of_each_gate() -> None:
    assert {name: mask.tolist() for name, mask in at_least(RATES, 0.5).items()} == {"a": [1, 0, 1, 0], "b": [0, 1, 0]}


@pytest.mark.parametrize("target", [0.2, 0.35, 0.6, 0.9])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_budget_is_kept_and_used_up_to_a_channel(kind: str, target: float) -> None:
    network = trained(kind)
    rates, cost = open_rates(network, [images(8)]), cost_at(network, SIZE)
    floor = cost.floor - cost.gate_macs / cost.dense
    if floor > target:
        with pytest.raises(ValueError, match="more than"):
            within_budget(rates, cost, target)
        return
    counts = list(widths(within_budget(rates, cost, target)).values())
    spent = cost.open_macs(torch.tensor(counts)).item() / cost.dense
    assert spent <= target
    ever_open = [int((rate > 0).sum()) for rate in rates.values()]
    for gate in range(len(counts)):
        more = [count + (g == gate) for g, count in enumerate(counts)]
        assert counts[gate] >= ever_open[gate] or cost.open_macs(torch.tensor(more)).item() / cost.dense > target


def test_a_budget_prefers_channels_that_open_more_often() -> None:
    network = trained("basic")
    # most of so narrow a network is its stem
    rates = {gate.name: torch.linspace(0.1, 0.9, gate.num_channels).double() for gate in gates_of(network)}
    for mask in within_budget(rates, cost_at(network, SIZE), 0.92).values():
        assert mask.tolist() == sorted(mask.tolist()), "the closed ones come first, as the rates rise"


def test_a_calibration_counts_the_multiply_accumulates_of_each_image() -> None:
    network = trained("bottleneck")  # where two gates meet, the mean of a product is not the product of means
    found, cost = calibrate(network, [images(5, 1), images(3, 2)]), cost_at(network, SIZE)
    openings = gated_pass(network, torch.cat([images(5, 1), images(3, 2)]), "hard").openings
    counted = torch.stack([opening.mask.sum(1) for opening in openings], dim=1)
    assert found.num_images == 8
    assert found.macs == pytest.approx(float(cost.ratio(counted).mean().detach()) * cost.dense, rel=1e-9)


def test_calibrating_leaves_the_network_in_training_if_it_was() -> None:
    network = trained("basic").train()
    open_rates(network, [images()])
    assert network.training


@pytest.mark.parametrize("multiple", [4, 8, 64])
def test_widths_are_multiples_or_full(multiple: int) -> None:
    network = trained("basic")
    rates, cost = open_rates(network, [images(8)]), cost_at(network, SIZE)
    floor = cost.open_macs(torch.tensor([min(multiple, width) for width in cost.widths])).item() / cost.dense
    for masks in (at_least(rates, 0.5, multiple=multiple), within_budget(rates, cost, floor + 0.05, multiple=multiple)):
        assert all(mask.sum() % multiple == 0 or mask.all() for mask in masks.values())
        for name, mask in masks.items():
            assert mask.all() or rates[name][mask == 1].min() >= rates[name][mask == 0].max()
    assert cost.open_macs(torch.tensor(list(widths(masks).values()))).item() <= (floor + 0.05) * cost.dense
    with pytest.raises(ValueError, match=f"{multiple} channels in each gate cost"):
        within_budget(rates, cost, floor - 0.01, multiple=multiple)


def test_rounding_up_adds_the_channels_that_open_most_often_of_the_rest() -> None:
    assert [mask.tolist() for mask in at_least(RATES, 0.5, multiple=3).values()] == [[1, 1, 1, 0], [1, 1, 1]]


def test_repaired_norms_hold_the_statistics_of_the_sliced_network_and_others_are_untouched() -> None:
    network = trained("basic")
    small = slice_network(network, plain("basic"), some_masks(network))
    names, before = norms_behind_gates(network), small.get_submodule("bn1").running_mean.clone()  # type: ignore[operator]
    assert "bn1" not in names
    assert "layer2.0.downsample.1" in names
    inputs: list[Tensor] = []
    small.get_submodule("layer1.0.bn2").register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    measure_norms(small, names, [images(8, 1), images(8, 2)])
    wanted = torch.stack([each.mean((0, 2, 3)) for each in inputs]).mean(0)
    repaired = small.get_submodule("layer1.0.bn2")
    assert isinstance(repaired, nn.BatchNorm2d)
    assert torch.allclose(repaired.running_mean, wanted, atol=1e-6)
    assert torch.equal(small.get_submodule("bn1").running_mean, before)  # type: ignore[arg-type]
    assert repaired.momentum == 0.1
    assert not any(module.training for module in small.modules())
