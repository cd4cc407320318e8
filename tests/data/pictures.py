"""Test pictures and betons, made on the spot."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.beton import BetonWriter
from data_prep.schema import SAMPLE_COLUMNS, row_text, samples_path
from trainer.data.kernel import PARAMS, Kernel
from trainer.data.views import View


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3) bytes with what photographs have: slow gradients, hard edges, saturated patches, noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.empty((height, width, 3))
    for channel in range(3):
        fx, fy, phase = rng.uniform(0.01, 0.1, 3)
        pixels[..., channel] = 128 + 110 * np.sin(fx * x + fy * y + 60 * phase)
    for _ in range(12):
        left, top = rng.integers(0, width), rng.integers(0, height)
        pixels[top : top + height // 4, left : left + width // 4] = rng.integers(0, 2, 3) * 255
    return np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", **{"quality": 90, **options})
    return file.getvalue()


def write_beton(path: Path, images: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> Path:
    """A beton with label = 10 * sample id and a sample list that names sample i "class/i.jpg"."""
    with BetonWriter(path, capacity=len(images)) as writer:
        for number, (data, (width, height)) in enumerate(zip(images, sizes, strict=True)):
            writer.add(data, width=width, height=height, label=10 * number)
        writer.finish()
    rows = [(i, 10 * i, f"class/{i}.jpg", w, h, "kept", "JPEG", "") for i, (w, h) in enumerate(sizes)]
    samples_path(path).write_text(row_text(SAMPLE_COLUMNS) + "".join(map(row_text, rows)), encoding="utf-8")
    return path


def plain_params(width: int, height: int, box: Sequence[float] | None = None) -> NDArray[np.void]:
    """(1,) parameters of a view that only resizes: from `box`, reading the whole image, or all of it."""
    params = np.zeros(1, PARAMS)
    params["box"], params["limit"] = box or (0, 0, width, height), (0, 0, width, height)
    params["order"], params["factor"] = (0, 1, 2, 3), (1, 1, 1, 0)
    return params


def render(pixels: NDArray[np.uint8], params: NDArray[np.void], size: int, **options: Any) -> NDArray[np.uint8]:
    """One (S, S, 3) view of raw pixels."""
    kernel = Kernel([View(size=size, scale=(0.1, 1.0))], **options)
    return kernel.render(pixels, params)[0][0]


def difference(ours: NDArray[np.uint8], reference: Any) -> NDArray[np.int64]:
    return np.abs(ours.astype(np.int64) - np.asarray(reference).astype(np.int64))
