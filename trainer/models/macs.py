"""What a network costs in multiply-accumulates of convolutions, as a pure function of geometry and open channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor


class Convolution(NamedTuple):
    """A convolution at one input size; a gate is a group of channels that are computed or not, by number."""

    in_channels: int
    out_channels: int
    taps: int
    """Of the kernel: 9 for 3 x 3."""
    positions: int
    """Height x width of its output."""
    groups: int = 1
    in_gate: int | None = None
    """The gate that its input channels have passed."""
    out_gate: int | None = None
    """The gate that its output channels meet; for a depth-wise convolution the same as `in_gate`."""

    def term(self) -> "Term":
        """Its share of a network's cost."""
        gates = tuple(dict.fromkeys(gate for gate in (self.in_gate, self.out_gate) if gate is not None))
        pairs = self.in_channels * self.out_channels // self.groups
        if self.groups > 1:
            return Term(self.taps * self.positions * pairs // (self.in_channels if gates else 1), gates)
        gated = (self.in_channels if self.in_gate is not None else 1) * (
            self.out_channels if self.out_gate is not None else 1
        )
        return Term(self.taps * self.positions * pairs // gated, gates)


class Term(NamedTuple):
    """`macs` x (open channels of each of the gates): a constant, a line, or a product where two gates meet."""

    macs: int
    gates: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of a gated network on images of one size. Norms, activations, pooling, the head: not counted.

    source: the count of the paper, arXiv 2301.09164, which calls multiply-accumulates FLOPs; here in whole numbers
    """

    widths: tuple[int, ...]
    """Channels of each gate."""
    terms: tuple[Term, ...]
    gate_macs: int
    """Of the gates' own layers, which a network pays that decides image by image."""

    @property
    def dense(self) -> int:
        """All channels open, and no gates."""
        return int(self._total(self.widths))

    def open_macs(self, counts: Tensor) -> Tensor:
        """Of the network without its gates' own layers: (..., G) open channels of each gate -> (...), float64."""
        total: Tensor = self._total(counts.double().unbind(-1))
        return total

    def _total(self, counts: Sequence[Any]) -> Any:
        return sum(term.macs * math.prod(counts[gate] for gate in term.gates) for term in self.terms)

    def ratio(self, counts: Tensor) -> Tensor:
        """Cost of a network that decides image by image, over the dense one's: (..., G) -> (...), float64."""
        return (self.open_macs(counts) + self.gate_macs) / self.dense

    @property
    def floor(self) -> float:
        """The ratio with one channel open in each gate: no budget below it can be met."""
        return self.ratio_at([1] * len(self.widths))

    def ratio_at(self, counts: Sequence[float]) -> float:
        """`ratio` of one list of counts, without a tensor."""
        return float((self._total(counts) + self.gate_macs) / self.dense)


def cost(convolutions: Sequence[Convolution], widths: Sequence[int], *, gate_macs: int) -> Cost:
    """The cost of a network of these convolutions; those that meet the same gates become one term."""
    merged: dict[tuple[int, ...], int] = {}
    for convolution in convolutions:
        macs, gates = convolution.term()
        merged[gates] = merged.get(gates, 0) + macs
    return Cost(tuple(widths), tuple(Term(macs, gates) for gates, macs in merged.items()), gate_macs)


@cache
def uniform_density(cost_at: Cost, target: float) -> float:
    """The share of open channels, the same in every gate, whose ratio is the target; by bisection, for it is monotone.

    raises: ValueError if no share in [0, 1] has it
    """

    def ratio(density: float) -> float:
        return cost_at.ratio_at([width * density for width in cost_at.widths])

    least, most = ratio(0), ratio(1)
    if not least <= target <= most:
        raise ValueError(f"a ratio of {target} is none of this network's, which lie in [{least:.4f}, {most:.4f}]")
    low, high = 0.0, 1.0
    for _ in range(60):  # to the last bit of a float64
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < target else (low, middle)
    return high
