"""Which patches a student does not get to see: pure functions of the run's seed and of what they are for.

Philox counts instead of remembering: its key and counter are (seed, epoch or step, sample, view), and its raw words are
the same in every numpy. So masks depend neither on ranks nor on pauses.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCKS, DROPS = 1, 2
"""Kinds of draws; the order of an epoch (trainer/data/order.py) is kind 0."""
MIN_ASPECT = 0.3
"""Of a block; the largest is its inverse. source: iBOT, main_ibot.py, pred_aspect_ratio"""
NUM_ATTEMPTS = 10
"""To place a block. source: iBOT, loader.py, after BEiT"""


def block_masks(
    sample_ids: Sequence[int], *, num_views: int, grid: tuple[int, int], prob: float, ratio: tuple[float, float],
    seed: int, epoch: int,
) -> NDArray[np.bool_]:  # fmt: skip
    """Blocks of masked patches for every view of every sample: (num_views * B, H * W), view-major.

    prob: how many of the views have a mask at all;  ratio: the least and the largest share of their patches in it
    """
    masks = np.zeros((num_views, len(sample_ids), *grid), dtype=np.bool_)
    for view in range(num_views):
        for row, sample in enumerate(sample_ids):
            draws = _uniforms(seed, epoch, kind=BLOCKS, sample=int(sample), view=view)
            if next(draws) < prob:
                wanted = (ratio[0] + (ratio[1] - ratio[0]) * next(draws)) * math.prod(grid)
                add_blocks(masks[view, row], wanted, draws)
    return masks.reshape(num_views * len(sample_ids), -1)


def add_blocks(mask: NDArray[np.bool_], wanted: float, draws: Iterator[float]) -> None:
    """Mask rectangles until `wanted` patches are masked or no further one fits; never more than wanted.

    mask: (H, W), changed in place
    source: iBOT, loader.py, pred_shape "block"
    """
    height, width = mask.shape
    num_masked = 0
    while num_masked < wanted:
        for _ in range(NUM_ATTEMPTS):
            area = _between((min(height, width) // 3) ** 2, wanted - num_masked, next(draws))
            aspect = math.exp(_between(math.log(MIN_ASPECT), -math.log(MIN_ASPECT), next(draws)))
            high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if high >= height or wide >= width:
                continue
            top, left = (int(next(draws) * (space + 1)) for space in (height - high, width - wide))
            block = mask[top : top + high, left : left + wide]
            if 0 < block.size - block.sum() <= wanted - num_masked:
                block[:] = True
                break
        else:
            return
        num_masked = int(mask.sum())


def kept_patches(num_patches: int, *, drop: float, seed: int, step: int) -> NDArray[np.int64]:
    """The patches that a whole batch keeps at a step, in random order: floor((1 - drop) N) of 0 .. N - 1.

    source: MSN, src/deit.py: one permutation for all images
    """
    words = _philox(seed, step, kind=DROPS, sample=0, view=0).random_raw(num_patches)
    return np.argsort(words, kind="stable")[: math.floor((1 - drop) * num_patches)].astype(np.int64, copy=False)


def on_device(drawn: NDArray[Any], device: torch.device) -> Tensor:
    """The same on the device; the host would wait for all that the device has to do if the memory were pageable."""
    tensor = torch.from_numpy(drawn)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _uniforms(seed: int, epoch: int, *, kind: int, sample: int, view: int) -> Iterator[float]:
    """Endless draws from [0, 1)."""
    source = _philox(seed, epoch, kind=kind, sample=sample, view=view)
    while True:
        yield from ((source.random_raw(32) >> np.uint64(11)) * 2.0**-53).tolist()


def _philox(seed: int, time: int, *, kind: int, sample: int, view: int) -> np.random.Philox:
    words = np.array([0, view, sample, kind], dtype=np.uint64)
    return np.random.Philox(key=np.array([seed, time], dtype=np.uint64), counter=words)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
