"""What happens to finished views on the device: bytes to normalised floats, and (photometric="device") the photometric
changes that the kernel then leaves out.

The kernel and this module draw the same parameters and use the same formulas. They differ in what they start from: the
kernel goes on from the resize's fractions, this module from bytes, so that after strong jitter they differ by a few
levels of 255 (mean below 0.5, see tests/data/test_photometric.py).
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_float(
    views: Tensor,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    params: NDArray[np.void] | None = None,
) -> Tensor:
    """Copies byte views to the device and normalises them there: a quarter of the traffic of copying floats.

    views: (V, B, 3, S, S) uint8, channels-last in memory
    params: (V, B), of Batch.params: changes the views on the device first
    returns: (V * B, 3, S, S), channels-last, view-major: (views / 255 - mean) / std
    """
    views = to_device(views, device)
    if params is not None:
        views = apply(views, params)
    count, size = views.shape[0] * views.shape[1], views.shape[-1]
    # whole rows of RGBRGB...: a broadcast over three channels is twice as slow on a CPU
    rows = views.permute(0, 1, 3, 4, 2).reshape(count, size, 3 * size).float()
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).repeat(size)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).repeat(size)
    floats = torch.addcmul(shift, rows, scale).to(dtype)
    return floats.view(count, size, size, 3).permute(0, 3, 1, 2)


def to_device(views: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, complete when this returns: the loader reuses its buffers at the next batch.

    The copy has a stream of its own, so that waiting for it does not wait for the training step before it.
    """
    if device.type != "cuda" or views.is_cuda:
        return views.to(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        copy = views.to(device, non_blocking=True)
    stream.synchronize()
    copy.record_stream(torch.cuda.current_stream(device))
    return copy


@torch.no_grad()
def apply(views: Tensor, params: NDArray[np.void]) -> Tensor:
    """Colour jitter, greyscale, blur and solarisation of a whole run of views; the kernel's `exact` colour.

    Who gets what is decided on the host, so nothing waits for the device.

    views: (V, B, 3, S, S) uint8 on any device; params: (V, B) of kernel.PARAMS
    returns: as views, changed
    """
    rows = params.reshape(-1)
    pixels = views.flatten(0, 1).float()
    _jitter(pixels, rows)
    _replace(pixels, rows["gray"] > 0, _saturation, np.zeros(len(rows), np.float32))
    reach = math.ceil(3 * rows["sigma"].max())
    _replace(pixels, rows["sigma"] > 0, partial(_blur, reach=reach), rows["sigma"])
    pixels = pixels.add_(0.5).clamp_(0, 255).byte()
    _replace(pixels, rows["solarize"] > 0, _solarize, np.full(len(rows), 128, np.float32))
    return pixels.view(views.shape)


def _replace(
    pixels: Tensor, mask: NDArray[np.bool_], change: Callable[[Tensor, Tensor], Tensor], values: NDArray[np.float32]
) -> None:
    """pixels[mask] = change(pixels[mask], values[mask]), the values as (N, 1, 1, 1)."""
    rows = np.flatnonzero(mask)
    if len(rows):
        index = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
        chosen = torch.from_numpy(values[rows]).to(pixels.device, non_blocking=True)
        pixels[index] = change(pixels[index], chosen.view(-1, 1, 1, 1))


def _jitter(pixels: Tensor, rows: NDArray[np.void]) -> None:
    for step in range(len(_OPS)):
        for op, change in enumerate(_OPS):
            mask = (rows["jitter"] > 0) & (rows["order"][:, step] == op)
            _replace(pixels, mask, change, rows["factor"][:, op])


def _luma(pixels: Tensor) -> Tensor:
    """(N, 3, S, S) to (N, 1, S, S): ITU-R 601-2, as in csrc/colour.h."""
    red, green, blue = (pixels[:, channel : channel + 1] for channel in range(3))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).clamp_(0, 255)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(pixels).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, pixels, factor).clamp_(0, 255)


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(pixels).expand_as(pixels), pixels, factor).clamp_(0, 255)


def _hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """RGB to HSV and back with the hue turned: only min, max and hue are needed, in sixths of a turn."""
    red, green, blue = (pixels[:, channel : channel + 1] for channel in range(3))
    high, low = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    chroma = high - low
    divisor = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(high == red, (green - blue) / divisor, hue)
    hue = (hue + 6 * turns) % 6
    shape = torch.cat([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], dim=1)
    return low + chroma * shape.clamp_(0, 1)


def _solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(pixels >= threshold, 255 - pixels, pixels)


_OPS = (_brightness, _contrast, _saturation, _hue)
"""In the order of the kernel's numbers."""


def _blur(pixels: Tensor, sigma: Tensor, *, reach: int) -> Tensor:
    """Gaussian cut at three sigma, borders mirrored, as two products with a banded (S, S) matrix for each image."""
    size, sigma = pixels.shape[-1], sigma.view(-1, 1)
    steps = torch.arange(-reach, reach + 1, device=pixels.device)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2) * (steps.abs() <= torch.ceil(3 * sigma))
    weights /= weights.sum(dim=1, keepdim=True)
    matrix = (weights @ _mirrored_shifts(size, reach, pixels.device)).view(-1, 1, size, size)
    return matrix @ pixels @ matrix.mT


@lru_cache(maxsize=8)
def _mirrored_shifts(size: int, reach: int, device: torch.device) -> Tensor:
    """(2 * reach + 1, size * size): matrix k takes pixel i from i + k - reach, mirrored at the borders."""
    period = max(2 * (size - 1), 1)
    source = np.abs(np.arange(size) + np.arange(-reach, reach + 1)[:, None]) % period
    source = np.where(source < size, source, period - source)
    shifts = (source[..., None] == np.arange(size)).astype(np.float32)
    return torch.from_numpy(shifts).flatten(1).to(device)
