"""Linear colour takes Y, Cb and Cr from the JPEG as they are stored: the views must be those of the decoded RGB.

Two things differ from decoding first: libjpeg rounds the upsampled chroma and every pixel's RGB, and it clamps RGB
before the resize, where Y, Cb and Cr together leave the cube. The first is worth a level or two, the second shows at
saturated edges only.
"""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.data.pictures import difference, jpeg, picture, plain_params
from trainer.data.kernel import BRIGHTNESS, CONTRAST, HUE, SATURATION, Kernel
from trainer.data.views import View

SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
SIZES = [(320, 213), (97, 211), (64, 64), (33, 500), (17, 5), (6, 9), (4, 4), (3, 2), (1, 1)]


def mild(width: int, height: int) -> NDArray[np.uint8]:
    """Colours so far inside the cube that nothing is clamped."""
    return (picture(width, height) // 4 + 90).astype(np.uint8)


def decoded(data: bytes) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def both(data: bytes, params: NDArray[np.void], size: int, **options: Any) -> list[NDArray[np.uint8]]:
    """The view from the JPEG's planes, and from its RGB."""
    kernel = Kernel([View(size=size, scale=(0.1, 1.0))], colour="linear", **options)
    pixels = decoded(data)
    height, width = pixels.shape[:2]
    return [kernel.render(data, params, size=(width, height))[0][0], kernel.render(pixels, params)[0][0]]


@pytest.mark.parametrize("size", [40, 128])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_view_of_the_planes_is_pils_decode_and_resize(width: int, height: int, subsampling: str, size: int) -> None:
    data, params = jpeg(mild(width, height), subsampling=SUBSAMPLINGS[subsampling]), plain_params(width, height)
    ours, _ = both(data, params, size, resize="triangle")
    reference = Image.fromarray(decoded(data)).resize((size, size), Image.Resampling.BILINEAR)
    distance = difference(ours, reference)
    assert distance.max() <= 2
    assert distance.mean() < 0.5


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_a_crop_takes_its_chroma_from_beyond_its_edges_as_the_decoder_does(subsampling: str) -> None:
    data = jpeg(mild(200, 151), subsampling=SUBSAMPLINGS[subsampling])
    for box in ((0, 0, 200, 151), (1, 0, 44, 151), (33, 20, 70, 55), (100, 91, 200, 151), (199, 150, 200, 151)):
        params = plain_params(200, 151, box)
        params["limit"] = box
        for flip in (0, 1):
            params["flip"] = flip
            ours, from_rgb = both(data, params, 64, resize="triangle")
            assert difference(ours, from_rgb).max() <= 2


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("gray", [0, 1])
def test_colour_changes_start_from_the_same_colours(subsampling: str, gray: int) -> None:
    data, params = jpeg(mild(150, 120), subsampling=SUBSAMPLINGS[subsampling]), plain_params(150, 120)
    params["jitter"], params["gray"], params["order"] = 1, gray, (HUE, SATURATION, CONTRAST, BRIGHTNESS)
    params["factor"], params["sigma"] = (1.2, 0.8, 1.3, 0.07), 1.1
    ours, from_rgb = both(data, params, 96, resize="bicubic")
    assert difference(ours, from_rgb).max() <= 2
    assert difference(ours, from_rgb).mean() < 0.5


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_saturated_edges_differ_seldom_and_a_little(subsampling: str) -> None:
    """Fully saturated patches with noise on them: far more of the cube's surface than photographs have."""
    data, params = jpeg(picture(400, 300), subsampling=SUBSAMPLINGS[subsampling]), plain_params(400, 300)
    ours, from_rgb = both(data, params, 128, resize="triangle")
    distance = difference(ours, from_rgb)
    assert distance.mean() < 1
    assert (distance <= 2).mean() > 0.9


def test_greys_stay_grey_and_flat_colours_flat() -> None:
    gray = jpeg(picture(90, 70)[..., 0])
    ours, from_rgb = both(gray, plain_params(90, 70), 40, resize="triangle")
    assert (ours[..., :1] == ours).all()
    assert difference(ours, from_rgb).max() <= 1
    flat = jpeg(np.full((70, 90, 3), (200, 30, 90), np.uint8))
    ours, _ = both(flat, plain_params(90, 70), 40)
    assert (ours == ours[0, 0]).all()
    assert difference(ours, decoded(flat)[0, 0]).max() <= 1


def test_jpegs_that_store_rgb_and_raw_pixels_are_read_as_such() -> None:
    data = jpeg(picture(90, 70), keep_rgb=True, subsampling=0)
    ours, from_rgb = both(data, plain_params(90, 70), 40)
    assert (ours == from_rgb).all()


def test_without_photometric_changes_the_planes_still_become_rgb() -> None:
    data, params = jpeg(mild(120, 90)), plain_params(120, 90)
    params["jitter"], params["gray"], params["solarize"], params["sigma"] = 1, 1, 1, 2.0
    ours, from_rgb = both(data, params, 48, resize="triangle", geometry_only=True)
    assert difference(ours, from_rgb).max() <= 2
    assert (ours[..., 0] != ours[..., 1]).any()
