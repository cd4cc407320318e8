"""What a view is: how it is cut from an image and how its pixels are changed. Plain settings, no heavy imports."""

from dataclasses import dataclass

MAX_SIZE = 4096
"""Largest view, in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A random view: crop, resize, flip, colour jitter, greyscale, blur, solarise, in that order."""

    size: int
    """Side of the square view, in pixels."""
    scale: tuple[float, float]
    """Smallest and largest fraction of the image's area that the crop may take."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop, drawn log-uniformly."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: float = 0.8
    """Probability of the four colour changes below, applied in random order."""
    brightness: float = 0.4
    """Factor uniform in [max(0, 1 - brightness), 1 + brightness]."""
    contrast: float = 0.4
    """Factor uniform in [max(0, 1 - contrast), 1 + contrast]."""
    saturation: float = 0.2
    """Factor uniform in [max(0, 1 - saturation), 1 + saturation]."""
    hue: float = 0.1
    """Hue shift uniform in [-hue, hue], in turns."""
    gray_prob: float = 0.2
    """Probability of greyscale."""
    blur_prob: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the view."""
    solarize_prob: float = 0.0
    """Probability of inverting every value of 128 and above."""

    def __post_init__(self) -> None:
        _check_size("size", self.size)
        _check_range("scale", self.scale, 0.0, 1.0)
        _check_range("ratio", self.ratio, 0.0, 100.0)
        _check_range("blur_sigma", self.blur_sigma, 0.0, 20.0)
        for name in ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
            _check_between(name, getattr(self, name), 0.0, 1.0)
        for name in ("brightness", "contrast", "saturation"):
            _check_between(name, getattr(self, name), 0.0, 10.0)
        _check_between("hue", self.hue, 0.0, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class CenterView:
    """The evaluation view: shorter side to `resize`, then the centre `size` x `size`; nothing is random.

    Sizes and offsets round as in torchvision's Resize and CenterCrop, but both are done as one resize of a box.
    """

    size: int
    """Side of the square view, in pixels."""
    resize: int
    """Length of the image's shorter side before the centre is cut out, in pixels."""

    def __post_init__(self) -> None:
        _check_size("size", self.size)
        if not self.size <= self.resize <= MAX_SIZE:
            raise ValueError(f"resize must lie in [size, {MAX_SIZE}] = [{self.size}, {MAX_SIZE}], got {self.resize}")


def _check_size(name: str, value: int) -> None:
    if not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{name} must lie in [1, {MAX_SIZE}] pixels, got {value}")


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")


def _check_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if len(value) != 2 or not low < value[0] <= value[1] <= high:
        raise ValueError(f"{name} must be (low, high) with {low:g} < low <= high <= {high:g}, got {value}")
