"""The resize against PIL's, which the published recipes used."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torchvision.transforms.v2 as transforms
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode

from tests.data.pictures import difference, jpeg, picture, plain_params, render
from trainer.data.kernel import Kernel, Resize
from trainer.data.views import CenterView, View

METHODS: dict[Resize, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "triangle": Image.Resampling.BILINEAR,
}
COMMON = [(500, 375, 224), (375, 500, 224), (400, 300, 96), (97, 211, 128), (200, 200, 97)]
ODD = [(31, 17, 33), (640, 20, 7), (20, 999, 5), (3, 2, 50), (1, 1, 9), (1, 7, 1), (2, 300, 31)]


def check_with_pil(ours: np.ndarray, reference: Image.Image, method: Resize) -> None:
    """PIL rounds and clamps to bytes between its two passes and we do not, which shows where edges overshoot."""
    distance = difference(ours, reference)
    assert (distance <= 1).mean() >= (1.0 if method == "triangle" else 0.998)
    assert distance.mean() < 0.2


def kernel_by_pil(x: NDArray[np.float64], method: Resize) -> NDArray[np.float64]:
    x = np.abs(x)
    if method == "triangle":
        return np.maximum(1 - x, 0)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights_by_pil(low: float, high: float, length: int, size: int, method: Resize) -> NDArray[np.float64]:
    """(size, length): what PIL's precompute_coeffs computes, as a dense matrix in float64."""
    scale = (high - low) / size
    stretch = max(scale, 1.0)
    matrix = np.zeros((size, length))
    for i in range(size):
        centre, support = low + (i + 0.5) * scale, (2 if method == "bicubic" else 1) * stretch
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        weights = kernel_by_pil((np.arange(first, last) - centre + 0.5) / stretch, method)
        matrix[i, first:last] = weights / weights.sum()
    return matrix


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("width", "height", "size"), COMMON + ODD)
def test_the_resize_is_pils_formula_without_its_rounding_in_between(
    method: Resize, width: int, height: int, size: int
) -> None:
    pixels = picture(width, height)
    rows = weights_by_pil(0, height, height, size, method)
    columns = weights_by_pil(0, width, width, size, method)
    exact = np.einsum("yh,hwc,xw->yxc", rows, pixels.astype(np.float64), columns, optimize=True)
    ours = render(pixels, plain_params(width, height), size, resize=method)
    error = np.abs(ours - np.clip(exact, 0, 255))
    assert error.max() < (0.6 if (width, height, size) in COMMON else 0.9)  # 0.5 of it is the rounding to bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("width", "height", "size"), COMMON)
def test_a_whole_image_resizes_as_in_pil(method: Resize, width: int, height: int, size: int) -> None:
    pixels = picture(width, height)
    ours = render(pixels, plain_params(width, height), size, resize=method)
    check_with_pil(ours, Image.fromarray(pixels).resize((size, size), METHODS[method]), method)


@pytest.mark.parametrize("method", METHODS)
def test_a_fractional_box_reads_beyond_its_edges_as_in_pil(method: Resize) -> None:
    pixels, box = picture(333, 251), (10.3, 20.7, 301.9, 199.2)
    ours = render(pixels, plain_params(333, 251, box), 100, resize=method)
    check_with_pil(ours, Image.fromarray(pixels).resize((100, 100), METHODS[method], box=box), method)


@pytest.mark.parametrize("method", METHODS)
def test_a_random_crop_never_reads_beyond_its_edges(method: Resize) -> None:
    pixels, box = picture(333, 251), (40, 31, 260, 200)
    params = plain_params(333, 251, box)
    params["limit"] = box
    ours = render(pixels, params, 128, resize=method)
    check_with_pil(ours, Image.fromarray(pixels).crop(box).resize((128, 128), METHODS[method]), method)


def test_flipping_mirrors_the_view_exactly() -> None:
    pixels, params = picture(200, 150), plain_params(200, 150)
    straight = render(pixels, params, 75)
    params["flip"] = 1
    assert (render(pixels, params, 75) == straight[:, ::-1]).all()


@pytest.mark.parametrize("level", [0, 1, 127, 128, 254, 255])
def test_a_flat_image_stays_exactly_flat(level: int) -> None:
    pixels = np.full((123, 457, 3), level, np.uint8)
    assert (render(pixels, plain_params(457, 123), 64) == level).all()


def test_a_view_of_the_images_own_size_is_the_image() -> None:
    pixels = picture(64, 64)
    assert (render(pixels, plain_params(64, 64), 64) == pixels).all()


def test_jpeg_and_raw_samples_of_the_same_pixels_give_the_same_view() -> None:
    data = jpeg(picture(160, 120), progressive=True)
    with Image.open(BytesIO(data)) as image:
        pixels = np.asarray(image)
    kernel, params = Kernel([CenterView(size=60, resize=80)]), plain_params(160, 120)
    assert (kernel.render(data, params, size=(160, 120))[0] == kernel.render(pixels, params)[0]).all()


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (333, 333), (257, 256), (301, 97), (96, 401), (223, 511)]
)
def test_the_evaluation_view_is_torchvisions_resize_and_centre_crop(width: int, height: int) -> None:
    pixels = picture(width, height)
    kernel = Kernel([CenterView(size=224, resize=256)])
    ours = kernel.render(pixels, kernel.draw([0], [width], [height])[:, 0])[0][0]
    reference = transforms.Compose(
        [transforms.Resize(256, InterpolationMode.BICUBIC, antialias=True), transforms.CenterCrop(224)]
    )(Image.fromarray(pixels))
    check_with_pil(ours, reference, "bicubic")


PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/imagenet1k_sample/original"


@pytest.mark.shared
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="needs ../shared/data/imagenet1k_sample")
def test_on_photographs_bicubic_is_pils_to_one_level_in_999_of_1000_pixels() -> None:
    plain = {"flip_prob": 0, "jitter_prob": 0, "gray_prob": 0, "blur_prob": 0}
    views = [View(size=224, scale=(0.3, 1.0), **plain), View(size=128, scale=(0.05, 0.3), **plain)]
    kernel, distances = Kernel(views), []
    for number, path in enumerate(sorted(PHOTOGRAPHS.rglob("*.JPEG"))):
        with Image.open(path) as opened:
            photograph = opened.convert("RGB")
        params = kernel.draw([number], [photograph.width], [photograph.height])[:, 0]
        for (ours,), drawn in zip(kernel.render(np.asarray(photograph), params), params, strict=True):
            crop = photograph.crop(drawn["box"].astype(int).tolist())
            distances.append(difference(ours, crop.resize((len(ours), len(ours)), Image.Resampling.BICUBIC)).ravel())
    assert len(distances) == 200
    assert (np.concatenate(distances) <= 1).mean() >= 0.999
