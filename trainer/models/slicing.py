"""From gated to small: which channels a gated network keeps, and an ordinary network that has no others."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.models.gated_blocks import KINDS
from trainer.models.gates import Masks
from trainer.models.gating import gated_pass, gated_state, gates_of
from trainer.models.macs import Cost

Rates = Mapping[str, Tensor]
"""For each gate, by its name in the network, the (C,) shares of images for which a channel is open; float64."""


@torch.no_grad()
def open_rates(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """How often each channel of a gated network is open, with hard gates, over batches of (B, 3, S, S) images."""
    gates, was_training = gates_of(network.eval()), network.training
    sums = [torch.zeros(gate.num_channels, dtype=torch.float64) for gate in gates]
    num_images = 0
    for images in batches:
        for total, opening in zip(sums, gated_pass(network, images, "hard").openings, strict=True):
            total += opening.mask.sum(0, dtype=torch.float64).cpu()
        num_images += len(images)
    network.train(was_training)
    if num_images == 0:
        raise ValueError("open rates need at least one image, got none")
    return {gate.name: total / num_images for gate, total in zip(gates, sums, strict=True)}


def at_least(rates: Rates, threshold: float) -> dict[str, Tensor]:
    """Masks of the channels that are open for a share of `threshold` or more, and of the most open one of each gate.

    A threshold just above 0 keeps all that ever open: what is dropped then never reached an output on those images.
    """
    return {name: _with_best(rate >= threshold, rate) for name, rate in rates.items()}


def _with_best(keep: Tensor, rate: Tensor) -> Tensor:
    keep = keep.clone()
    keep[rate.argmax()] = True
    return keep.float()


def within_budget(rates: Rates, cost: Cost, target: float) -> dict[str, Tensor]:
    """Masks of the channels that open most often for what they cost, until the sliced network costs the target.

    Greedy: channels enter by rate / (what the dense network saves without one of its gate), ties by gate and number;
    one that no longer fits is passed over, and cheaper ones may still enter. One that never opens stays out.
    target: of the dense network's multiply-accumulates; a sliced network pays for no gates
    raises: ValueError if one channel in each gate costs more
    """
    counts = [1] * len(cost.widths)
    if _share(cost, counts) > target:
        floor = _share(cost, counts)
        raise ValueError(f"one channel in each gate costs {floor:.4f} of the dense network, more than {target}")
    each = list(rates.values())
    masks = [_with_best(torch.zeros_like(rate, dtype=torch.bool), rate) for rate in each]
    full = _share(cost, cost.widths)
    prices = [full - _share(cost, [w - (i == g) for i, w in enumerate(cost.widths)]) for g in range(len(counts))]
    spare = [(g, c) for g, mask in enumerate(masks) for c in range(len(mask)) if not mask[c] and each[g][c] > 0]
    for g, c in sorted(spare, key=lambda channel: -float(each[channel[0]][channel[1]]) / prices[channel[0]]):
        more = [count + (gate == g) for gate, count in enumerate(counts)]
        if _share(cost, more) <= target:
            counts, masks[g][c] = more, 1.0
    return dict(zip(rates, masks, strict=True))


def _share(cost: Cost, counts: Sequence[float]) -> float:
    return cost.ratio_at(counts) - cost.gate_macs / cost.dense


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
