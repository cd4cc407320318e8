"""What `benchmarks/loader.py` compares with: each maker returns a function that makes the same views of every image.

All start from the same JPEG bytes and make 2 + 6 views. What a peer leaves out is said in its docstring.
"""

import ctypes
import io
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode

from trainer.data.views import View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = [
    View(size=224, scale=(0.3, 1.0), blur_prob=1.0),
    View(size=224, scale=(0.3, 1.0), blur_prob=0.1, solarize_prob=0.2),
    *[View(size=128, scale=(0.05, 0.3))] * 6,
]
"""SSLight's: 2 x 224 of area 0.3 to 1, 6 x 128 of area 0.05 to 0.3."""
Epoch = Callable[[], int]
"""Makes the views of every image once; returns how many images those were."""


class PILBlur:
    """The blur of the published DINO, SwAV and SSLight pipelines."""

    def __init__(self, prob: float, sigma: tuple[float, float]) -> None:
        self.prob, self.sigma = prob, sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.prob:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class PILSolarize:
    def __init__(self, prob: float) -> None:
        self.prob = prob

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.prob else image


def published(view: View) -> v1.Compose:
    """As the authors' code builds it (SSLight src/data/transforms.py, DINO main_dino.py)."""
    jitter = v1.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return v1.Compose([
        v1.RandomResizedCrop(view.size, view.scale, interpolation=InterpolationMode.BICUBIC),
        v1.RandomHorizontalFlip(view.flip_prob), v1.RandomApply([jitter], view.jitter_prob),
        v1.RandomGrayscale(view.gray_prob), PILBlur(view.blur_prob, view.blur_sigma), PILSolarize(view.solarize_prob),
        v1.ToTensor(), v1.Normalize(MEAN, STD),
    ])  # fmt: skip


def pil(images: Sequence[bytes], views: Sequence[View]) -> Epoch:
    """Decodes once; ends in normalised floats. Without a DataLoader's pickling and copying, so an upper bound."""
    transforms = [published(view) for view in views]

    def epoch() -> int:
        for data in images:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            for transform in transforms:
                transform(image)
        return len(images)

    return epoch


def torchvision_uint8(images: Sequence[bytes], views: Sequence[View]) -> Epoch:
    """torchvision v2 on byte tensors, decoded once by its own decoder; ends in normalised floats."""

    def compose(view: View) -> v2.Compose:
        jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        blur = v2.GaussianBlur(2 * round(3 * view.blur_sigma[1]) + 1, view.blur_sigma)
        return v2.Compose([
            v2.RandomResizedCrop(view.size, view.scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(view.flip_prob), v2.RandomApply([jitter], view.jitter_prob),
            v2.RandomGrayscale(view.gray_prob), v2.RandomApply([blur], view.blur_prob),
            v2.RandomSolarize(128, view.solarize_prob), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    transforms = [compose(view) for view in views]
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]

    def epoch() -> int:
        for data in tensors:
            image = decode_jpeg(data, mode=ImageReadMode.RGB)
            for transform in transforms:
                transform(image)
        return len(images)

    return epoch


def stock_ffcv(beton: Path, views: Sequence[View], batch_size: int, ids: NDArray[np.int64]) -> Epoch:
    """As `ffcv_loader` says. Its compiler runs in the first round, which is not counted."""
    loader = ffcv_loader(beton, views, batch_size, ids)

    def epoch() -> int:
        return sum(len(batch[0]) for batch in loader)

    return epoch


def ffcv_loader(beton: Path, views: Sequence[View], batch_size: int, ids: NDArray[np.int64]) -> Any:
    """FFCV's own way to many views: one RandomResizedCrop decoder each, so the JPEG is decoded for each view.

    Crops and flips only: FFCV has no hue, greyscale, blur or solarisation. Bytes out, not normalised.
    """
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    def crop(view: View) -> PipelineSpec:
        decoder = RandomResizedCropRGBImageDecoder((view.size, view.size), view.scale, view.ratio)
        return PipelineSpec("image", decoder=decoder, transforms=[RandomHorizontalFlip(view.flip_prob), ToTensor()])

    pipelines: dict[str, Any] = {"image": None, "label": None}
    pipelines |= {f"view{i}": crop(view) for i, view in enumerate(views)}
    order = OrderOption.SEQUENTIAL
    indices = ids.astype(np.uint64)
    return Loader(
        str(beton), batch_size, num_workers=1, order=order, pipelines=pipelines, indices=indices, drop_last=False
    )


def prototype(
    folder: Path,
    images: Sequence[bytes],
    sizes: Sequence[tuple[int, int]],
    views: Sequence[View],
    build: Path,
    *,
    fast: bool,
) -> Epoch:
    """`folder` holds mc.c, an earlier dense proof of speed for AVX2 only: planar bytes, no status, no promises."""
    library = build / "libmc.so"
    command = ["gcc", "-O3", "-march=x86-64-v3", "-ffast-math", "-shared", "-fPIC", str(folder / "mc.c")]
    subprocess.run([*command, "-o", str(library), "-ljpeg", "-lm"], check=True)
    make = ctypes.CDLL(str(library)).mc_auto
    make.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    settings = np.zeros(5 * 8 + 32 * 64, np.uint8)
    settings[:40].view(np.int64)[:] = [0, 0, len(views), 0 if fast else 1, 4 if fast else 4 | 8]
    rows = settings[40:].view(np.float32).reshape(32, 16)
    for row, view in zip(rows, views, strict=False):
        row[:] = [
            view.size,
            *view.scale,
            view.flip_prob,
            view.jitter_prob,
            view.brightness,
            view.contrast,
            view.saturation,
            view.hue,
            view.gray_prob,
            view.blur_prob,
            *view.blur_sigma,
            view.solarize_prob,
            *view.ratio,
        ]
    buffers = [np.frombuffer(data, np.uint8) for data in images]
    out = np.empty(sum(3 * view.size**2 for view in views), np.uint8)

    def epoch() -> int:
        for i, (data, (width, height)) in enumerate(zip(buffers, sizes, strict=True)):
            make(data.ctypes.data, data.nbytes, height, width, settings.ctypes.data, i, out.ctypes.data)
        return len(images)

    return epoch
