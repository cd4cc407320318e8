"""Colour, blur and solarisation against torchvision, PIL and a Gaussian written out in float64."""

from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as functional
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tests.data.pictures import difference, picture, plain_params, render
from trainer.data.kernel import BRIGHTNESS, CONTRAST, HUE, SATURATION, Colour

SIZE = 96
OPS = {
    BRIGHTNESS: functional.adjust_brightness,
    CONTRAST: functional.adjust_contrast,
    SATURATION: functional.adjust_saturation,
    HUE: functional.adjust_hue,
}


def jitter(
    pixels: NDArray[np.uint8],
    factors: dict[int, float],
    order: tuple[int, ...] = (0, 1, 2, 3),
    colour: Colour = "exact",
    gray: bool = False,
) -> NDArray[np.uint8]:
    params = plain_params(SIZE, SIZE)
    params["jitter"], params["gray"], params["order"] = 1, gray, order
    for op, factor in factors.items():
        params["factor"][0, op] = factor
    return render(pixels, params, SIZE, colour=colour)


def by_torchvision(pixels: NDArray[np.uint8], factors: dict[int, float], order: tuple[int, ...]) -> NDArray[np.uint8]:
    """On float tensors: nothing is rounded between operations, as in ours."""
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    for op in order:
        if op in factors:
            image = OPS[op](image, factors[op])
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("op", "factor"),
    [(BRIGHTNESS, 0.6), (BRIGHTNESS, 1.8), (CONTRAST, 0.0), (CONTRAST, 1.4), (SATURATION, 0.2), (SATURATION, 1.8),
     (HUE, 0.1), (HUE, -0.2), (HUE, 0.5), (HUE, -0.5)],
)  # fmt: skip
def test_one_colour_operation_is_torchvisions(op: int, factor: float) -> None:
    pixels = picture(SIZE, SIZE, 3)
    distance = difference(jitter(pixels, {op: factor}), by_torchvision(pixels, {op: factor}, (op,)))
    assert distance.max() <= 1
    assert (distance > 0).mean() < 0.03


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_four_colour_operations_in_any_order_are_torchvisions(order: tuple[int, ...]) -> None:
    pixels, factors = picture(SIZE, SIZE, 4), {BRIGHTNESS: 1.3, CONTRAST: 0.7, SATURATION: 1.2, HUE: -0.08}
    distance = difference(jitter(pixels, factors, order), by_torchvision(pixels, factors, order))
    assert distance.max() <= 2  # hue turns quickly where a pixel is nearly grey
    assert (distance > 0).mean() < 0.05


def test_the_linear_form_equals_the_exact_one_where_nothing_is_clamped_and_no_hue_turned() -> None:
    pixels = (picture(SIZE, SIZE, 5) // 4 + 90).astype(np.uint8)
    factors = {BRIGHTNESS: 0.9, CONTRAST: 1.2, SATURATION: 1.1}
    for order in permutations(range(4)):
        exact, linear = (jitter(pixels, factors, order, colour) for colour in ("exact", "linear"))
        assert difference(exact, linear).max() <= 1


def test_the_linear_hue_turns_about_the_grey_axis() -> None:
    gray = np.repeat(picture(SIZE, SIZE)[..., :1], 3, axis=2)
    assert difference(jitter(gray, {HUE: 0.3}, colour="linear"), gray).max() <= 1
    cycled = jitter(picture(SIZE, SIZE), {HUE: 1 / 3}, colour="linear")
    assert difference(cycled, np.roll(picture(SIZE, SIZE), 1, axis=2)).max() <= 1  # a third of a turn: red to green


@pytest.mark.parametrize("colour", ["exact", "linear"])
def test_greyscale_is_pils(colour: Colour) -> None:
    pixels = picture(SIZE, SIZE, 6)
    ours = jitter(pixels, {}, colour=colour, gray=True)
    assert (ours[..., :1] == ours).all()
    assert difference(ours[..., 0], Image.fromarray(pixels).convert("L")).max() <= 1


def test_solarisation_is_pils_to_the_bit() -> None:
    pixels, params = picture(SIZE, SIZE, 7), plain_params(SIZE, SIZE)
    params["solarize"] = 1
    assert (render(pixels, params, SIZE) == np.asarray(ImageOps.solarize(Image.fromarray(pixels)))).all()


def gaussian_blur(pixels: NDArray[np.uint8], sigma: float) -> NDArray[np.float64]:
    """Float64, loops over taps, cut at three sigma, borders mirrored about the edge pixel."""
    radius = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    image = pixels.astype(np.float64)
    for axis in (0, 1):
        margins = [(radius, radius) if i == axis else (0, 0) for i in range(3)]
        padded = np.pad(image, margins, mode="reflect")
        image = sum(w * np.take(padded, range(k, k + image.shape[axis]), axis) for k, w in enumerate(weights))
    return image


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.9, 1.0, 1.7, 2.0, 2.4, 5.0])
@pytest.mark.parametrize("size", [1, 5, 31, 64])
def test_blur_is_a_gaussian(sigma: float, size: int) -> None:
    pixels, params = picture(size, size, 8), plain_params(size, size)
    params["sigma"] = sigma
    error = render(pixels, params, size) - gaussian_blur(pixels, sigma)
    assert np.abs(error).max() < 0.75  # half of it is the rounding to bytes
    assert abs(error.mean()) < (0.05 if size > 5 else 0.5)


def test_the_steps_run_in_the_published_order() -> None:
    """Colour, greyscale, blur, solarisation: any other order of these two pairs gives other pixels."""
    pixels, params = picture(SIZE, SIZE, 9), plain_params(SIZE, SIZE)
    params["jitter"], params["sigma"], params["solarize"] = 1, 1.5, 1
    params["factor"][0, BRIGHTNESS] = 1.4
    step = by_torchvision(pixels, {BRIGHTNESS: 1.4}, (BRIGHTNESS,))
    reference = ImageOps.solarize(Image.fromarray(np.rint(gaussian_blur(step, 1.5)).astype(np.uint8)))
    distance = difference(render(pixels, params, SIZE), reference)
    assert (distance > 2).mean() < 0.01  # solarisation turns a rounding at its threshold into a step
