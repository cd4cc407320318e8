"""From gated to small: which channels a gated network keeps, and an ordinary network that has no others."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.models.gated_blocks import KINDS, ModeNorm
from trainer.models.gates import Masks
from trainer.models.gating import cost_at, counts, gated_pass, gated_state, gates_of
from trainer.models.macs import Cost

Rates = Mapping[str, Tensor]
"""For each gate, by its name in the network, the (C,) shares of images for which a channel is open; float64."""


class Calibration(NamedTuple):
    """What hard gates did on some images."""

    rates: dict[str, Tensor]
    macs: float
    """Mean multiply-accumulates of an image, the gates' own included."""
    num_images: int


@torch.no_grad()
def calibrate(network: nn.Module, batches: Iterable[Tensor]) -> Calibration:
    """Run a gated network with hard gates over batches of (B, 3, S, S) images, all of one size.

    raises: ValueError if there are no images
    """
    was_training, gates = network.training, gates_of(network.eval())
    sums = [torch.zeros(gate.num_channels, dtype=torch.float64) for gate in gates]
    macs, num_images = 0.0, 0
    for images in batches:
        openings, cost = gated_pass(network, images, "hard").openings, cost_at(network, images.shape[-1])
        for total, opening in zip(sums, openings, strict=True):
            total += opening.mask.sum(0, dtype=torch.float64).cpu()
        macs += float((cost.open_macs(counts(openings, hard=True)) + cost.gate_macs).sum())
        num_images += len(images)
    network.train(was_training)
    if num_images == 0:
        raise ValueError("open rates need at least one image, got none")
    rates = {gate.name: total / num_images for gate, total in zip(gates, sums, strict=True)}
    return Calibration(rates, macs / num_images, num_images)


def open_rates(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """How often each channel of a gated network is open, with hard gates, over batches of (B, 3, S, S) images."""
    return calibrate(network, batches).rates


def at_least(rates: Rates, threshold: float, *, multiple: int = 1) -> dict[str, Tensor]:
    """Masks of the channels that are open for a share of `threshold` or more, and of the most open one of each gate.

    A threshold just above 0 keeps all that ever open: what is dropped then never reached an output on those images.
    multiple: what widths are rounded up to, by the channels that open most often of the rest
    """
    wanted = {name: max(1, int((rate >= threshold).sum())) for name, rate in rates.items()}
    return {name: _most_open(rate, math.ceil(wanted[name] / multiple) * multiple) for name, rate in rates.items()}


def _most_open(rate: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(rate))
    mask[rate.argsort(descending=True, stable=True)[:count]] = 1
    return mask


def within_budget(rates: Rates, cost: Cost, target: float, *, multiple: int = 1) -> dict[str, Tensor]:
    """Masks of the channels that open most often for what they cost, until the sliced network costs the target.

    Greedy: channels enter by rate / (what the dense network saves without one of its gate), ties by gate and number;
    a gate whose next ones no longer fit is done, and cheaper ones of others may still enter. One that never opens stays
    out, unless it fills a multiple.
    target: of the dense network's multiply-accumulates; a sliced network pays for no gates
    multiple: how many channels of a gate enter together, so that all widths are multiples of it, or a gate's full one
    raises: ValueError if one such group in each gate costs more
    """
    falling = [rate.sort(descending=True, stable=True).values for rate in rates.values()]
    kept = [min(multiple, len(rate)) for rate in falling]
    if (floor := _share(cost, kept)) > target:
        least = "one channel in each gate costs" if multiple == 1 else f"{multiple} channels in each gate cost"
        raise ValueError(f"{least} {floor:.4f} of the dense network, more than {target}")
    full = _share(cost, cost.widths)
    prices = [full - _share(cost, [w - (i == g) for i, w in enumerate(cost.widths)]) for g in range(len(kept))]
    groups = [
        (g, group)
        for g, rate in enumerate(falling)
        for group in torch.split(rate, multiple)[1:]
        if group[0] > 0
    ]  # fmt: skip
    done: set[int] = set()
    for g, group in sorted(groups, key=lambda each: -float(each[1].mean()) / prices[each[0]]):
        more = [count + len(group) * (gate == g) for gate, count in enumerate(kept)]
        if g not in done and _share(cost, more) <= target:
            kept = more
        else:
            done.add(g)
    return {name: _most_open(rate, count) for (name, rate), count in zip(rates.items(), kept, strict=True)}


def _share(cost: Cost, kept: Sequence[float]) -> float:
    return cost.ratio_at(kept) - cost.gate_macs / cost.dense


def slice_network(gated: nn.Module, plain: nn.Module, masks: Masks) -> nn.Module:
    """The gated network with static masks, as an ordinary one without the closed channels and without gates.

    plain: the same timm network as it was before `add_gates`; it is copied
    """
    network = copy.deepcopy(plain)
    network.load_state_dict(gated_state(gated.state_dict()))
    narrow(network, masks)
    return network.train(gated.training)


@torch.no_grad()
def narrow(network: nn.Module, masks: Masks) -> None:
    """Drop the closed channels of a plain timm network's blocks in place.

    masks: for each gate that `add_gates` would make, by its name
    """
    for name, block in network.named_modules():
        kind = KINDS.get(type(block))
        if kind is None:
            continue
        kept = [masks[f"{name}.{layer}"].nonzero()[:, 0] for layer in kind.gated_layers]
        for layer, (of_input, of_output) in kind.convolutions.items():
            inputs, outputs = (None if gate is None else kept[gate] for gate in (of_input, of_output))
            _narrow_convolution(block.get_submodule(layer), inputs, outputs)
        for layer, gate in kind.norms.items():
            _narrow_norm(block.get_submodule(layer), kept[gate])


def _narrow_convolution(conv: nn.Module, inputs: Tensor | None, outputs: Tensor | None) -> None:
    assert isinstance(conv, nn.Conv2d)
    weight: Tensor = conv.weight if outputs is None else conv.weight[outputs.to(conv.weight.device)]
    if conv.groups > 1:  # depth-wise: its one input channel is its own
        conv.groups = len(weight)
    elif inputs is not None:
        weight = weight[:, inputs.to(weight.device)]
    conv.out_channels, conv.in_channels = len(weight), weight.shape[1] * conv.groups
    conv.weight = nn.Parameter(weight.contiguous())


def _narrow_norm(norm: nn.Module, kept: Tensor) -> None:
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    kept = kept.to(norm.weight.device)
    norm.num_features = len(kept)
    norm.weight, norm.bias = nn.Parameter(norm.weight[kept]), nn.Parameter(norm.bias[kept])
    norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]


def norms_behind_gates(gated: nn.Module) -> list[str]:
    """Names of the norms whose inputs depend on what gates open: those that a gated network has twice."""
    return [name for name, module in gated.named_modules() if isinstance(module, ModeNorm)]


@torch.no_grad()
def measure_norms(network: nn.Module, names: Sequence[str], batches: Iterable[Tensor]) -> None:
    """Give the named BatchNorms the mean statistics of these batches of (B, 3, S, S) images, in place of their own.

    One pass: each norm sees what those before it make of the batch at hand.
    """
    norms = [norm for name in names if isinstance(norm := network.get_submodule(name), nn.BatchNorm2d)]
    momenta, was_training = [norm.momentum for norm in norms], network.training
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # every batch counts the same
    for images in batches:
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train(was_training)


def widths(masks: Masks) -> dict[str, int]:
    """How many channels are left behind each gate, as JSON takes it."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def first_channels(network: nn.Module, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks of the first so many channels: what makes a plain network of the widths that weights will be loaded into.

    raises: ValueError if the widths are those of another network
    """
    full = {
        f"{name}.{layer}": block.get_submodule(layer).out_channels
        for name, block in network.named_modules()
        if type(block) in KINDS
        for layer in KINDS[type(block)].gated_layers
    }
    if set(full) != set(widths) or any(not 1 <= widths[name] <= int(full[name]) for name in full):
        raise ValueError(f"widths {dict(widths)} are not of this network, whose blocks have at most {full}")
    return {name: (torch.arange(int(width)) < widths[name]).float() for name, width in full.items()}
