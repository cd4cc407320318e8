"""Settings of the evaluation protocols, and the check that recipe blocks share."""

from dataclasses import dataclass
from typing import Any


def at_least(block: Any, **limits: int) -> None:
    """ValueError if a field of the block lies below its limit."""
    for name, limit in limits.items():
        if getattr(block, name) < limit:
            raise ValueError(f"{name} must be at least {limit}, got {getattr(block, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class KNN:
    """Weighted k-nearest-neighbour accuracy of val images among the train images' features."""

    every_epochs: int
    """During training; 0 for never."""
    k: int = 20
    temperature: float = 0.07
    size: int = 224
    resize: int = 256
    """The shorter side is resized to this before the centre crop of `size`."""
    batch_size: int = 256
    """Images a rank."""

    def __post_init__(self) -> None:
        at_least(self, every_epochs=0, k=1, batch_size=1, size=8, resize=self.size)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeEval:
    """Accuracy of the joint probe on val images, which are read as k-NN reads them."""

    every_epochs: int
    """0 for never; without `probe: true` there is nothing to evaluate."""

    def __post_init__(self) -> None:
        at_least(self, every_epochs=0)
