"""Gated networks: one set of weights that runs dense, or with only the channels that its gates open for an image."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.models.gated_blocks import KINDS, GatedBlock, ModeNorm
from trainer.models.gates import Gate, Gates, Masks, Mode, Opening, Switch
from trainer.models.macs import Convolution, Cost, cost


class Gating:
    """What a gated network knows of itself: its attribute `gating`, copied with it, and no part of its state."""

    def __init__(self, settings: Gates, switch: Switch, twin: nn.Module) -> None:
        self.settings = settings
        self.switch = switch
        self.twin = twin
        """The network on torch's meta device, without data, which a dry pass measures."""
        self.costs: dict[int, Cost] = {}


class Pass(NamedTuple):
    """Features of a gated pass, and what each gate did."""

    features: Tensor
    openings: list[Opening]


def add_gates(network: nn.Module, settings: Gates) -> None:
    """Give a timm network gates in place; it then runs dense until `in_mode` says otherwise.

    Norms from the first gated block on get a second set of weights and statistics, for all gated modes.
    raises: ValueError if it has no block that gates fit
    """
    switch = Switch()
    for name, block in gateable_blocks(network, key="gates"):
        network.set_submodule(name, KINDS[type(block)](block, name, settings, switch))
    _split_norms(network, switch)
    network.gating = Gating(settings, switch, copy.deepcopy(network).to("meta").eval())  # type: ignore[assignment]


def gateable_blocks(network: nn.Module, *, key: str) -> list[tuple[str, nn.Module]]:
    """The blocks that gates fit, by name, in order.

    key: of the recipe's backbone, for the message
    raises: ValueError if there is none, or one has layers that gated blocks do not know
    """
    blocks = [(name, block) for name, block in network.named_modules() if type(block) in KINDS]
    if not blocks:
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"backbone.{key}: the network has no block that gates fit, which are timm's {kinds}")
    for name, block in blocks:
        for layer in ("se", "aa", "drop_block", "conv_s2d"):
            if not isinstance(getattr(block, layer, None), nn.Identity | None):
                raise ValueError(
                    f"backbone.{key}: block {name} has a layer {layer}, which the gated block does not know"
                )
        for layer in KINDS[type(block)].convolutions:
            convolution: Any = getattr(block, layer)
            if convolution.groups not in (1, convolution.out_channels):
                raise ValueError(
                    f"backbone.{key}: block {name} has grouped convolutions, and gates close single channels"
                )
    return blocks


def _split_norms(network: nn.Module, switch: Switch) -> None:
    """timm registers layers in the order in which they run, so the stem's come first."""
    behind_first_gate = False
    for name, module in list(network.named_modules()):
        behind_first_gate |= isinstance(module, GatedBlock)
        if behind_first_gate and isinstance(module, _BatchNorm) and ".gates." not in name:
            network.set_submodule(name, ModeNorm(module, switch))


def is_gated(network: nn.Module) -> bool:
    """Whether `add_gates` was here."""
    return hasattr(network, "gating")


def gating_of(network: nn.Module) -> Gating:
    """Its switch and its costs; ValueError if it has no gates."""
    gating = getattr(network, "gating", None)
    if not isinstance(gating, Gating):
        raise ValueError("the network has no gates; set backbone.gates")
    return gating


def gates_of(network: nn.Module) -> list[Gate]:
    """The gates, in the order in which images pass them."""
    return [module for module in network.modules() if isinstance(module, Gate)]


def gate_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Those of the gates alone, which neither decay nor adapt. source: arXiv 2301.09164's code, for decay"""
    return [parameter for gate in gates_of(network) for parameter in gate.parameters()]


@contextmanager
def in_mode(network: nn.Module, mode: Mode, masks: Masks | None = None) -> Iterator[list[Opening]]:
    """Run the network's passes in a mode; each pass of all gates adds one opening a gate to the list.

    masks: of mode static, a (C,) mask for each gate by its name
    """
    switch = gating_of(network).switch
    before = switch.mode, switch.masks, switch.openings
    openings: list[Opening] = []
    switch.mode, switch.masks, switch.openings = mode, masks or {}, openings
    try:
        yield openings
    finally:
        switch.mode, switch.masks, switch.openings = before


def gated_pass(network: nn.Module, images: Tensor, mode: Mode) -> Pass:
    """One pass in a mode: (B, 3, S, S) -> features (B, num_features), and each gate's opening."""
    with in_mode(network, mode) as openings:
        return Pass(network(images), openings)


def always_hard(network: nn.Module) -> None:
    """Let a finished gated network decide image by image wherever no other mode is asked for."""
    gating_of(network).switch.mode = "hard"


class InMode(nn.Module):
    """A gated network as a network of one mode, for those who evaluate networks: (B, 3, S, S) -> features."""

    def __init__(self, network: nn.Module, mode: Mode) -> None:
        super().__init__()
        self.network, self.mode = network, mode
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        """A pass in the mode."""
        return gated_pass(self.network, images, self.mode).features


def counts(openings: list[Opening], *, hard: bool) -> Tensor:
    """Open channels of each gate and image, (B, G), as applied or without noise."""
    return torch.stack([(opening.hard if hard else opening.mask).sum(1) for opening in openings], dim=1)


def cost_at(network: nn.Module, size: int) -> Cost:
    """What the gated network costs on images of a size, measured once by a pass without data."""
    gating = gating_of(network)
    if size not in gating.costs:
        gating.costs[size] = _measure(gating.twin, size)
    return gating.costs[size]


def check_target(network: nn.Module, sizes: Iterable[int]) -> None:
    """Whether a gated network can meet its budget at each size of its views; a network without gates has none.

    raises: ValueError with what the network costs at least
    """
    for size in sorted(set(sizes)) if is_gated(network) else ():
        target, floor = gating_of(network).settings.target, cost_at(network, size).floor
        if target <= floor:
            raise ValueError(
                f"backbone.gates.target is {target}, and views of {size} px cost at least {floor:.4f} of the dense "
                "network, with one channel open in each gate; set a larger target"
            )


def _measure(twin: nn.Module, size: int) -> Cost:
    positions: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        positions[module] = output.shape[-2] * output.shape[-1]

    hooks = [m.register_forward_hook(note) for m in twin.modules() if isinstance(m, nn.Conv2d)]
    twin(torch.zeros(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    gates = gates_of(twin)
    passed = _gates_of_convolutions(twin)
    convolutions = [
        Convolution(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0] * conv.kernel_size[1],
            count,
            conv.groups,
            *passed.get(conv, (None, None)),
        )
        for conv, count in positions.items()
        if isinstance(conv, nn.Conv2d)
    ]
    return cost(convolutions, [gate.num_channels for gate in gates], gate_macs=sum(gate.macs for gate in gates))


def _gates_of_convolutions(network: nn.Module) -> dict[nn.Module, tuple[int | None, int | None]]:
    """By number in the network, the gates that each convolution's inputs and outputs pass."""
    found: dict[nn.Module, tuple[int | None, int | None]] = {}
    first = 0
    for block in (module for module in network.modules() if isinstance(module, GatedBlock)):
        for layer, (of_input, of_output) in block.convolutions.items():
            numbers = tuple(None if gate is None else first + gate for gate in (of_input, of_output))
            found[getattr(block, layer)] = numbers[0], numbers[1]
        first += len(block.gates)
    return found


def dense_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the dense network alone, under timm's names; those of a network without gates as they are."""
    return _of_one_mode(state, "dense_norm", "gated_norm")


def gated_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with the norms of the gated modes: the network whose channels a static mask or a slice chooses."""
    return _of_one_mode(state, "gated_norm", "dense_norm")


def _of_one_mode(state: Mapping[str, Tensor], mine: str, other: str) -> dict[str, Tensor]:
    return {
        name.replace(f".{mine}.", "."): value
        for name, value in state.items()
        if f".{other}." not in name and ".gates." not in name
    }
