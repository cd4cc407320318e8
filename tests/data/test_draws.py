"""What is drawn for a view: the generator's known answers, torchvision's laws, and independence of everything else."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torchvision.transforms import RandomResizedCrop

from trainer.data.kernel import LIB, PARAMS, Kernel
from trainer.data.views import CenterView, View

DRAWS = 10_000
VIEW = View(size=32, scale=(0.05, 0.3), blur_prob=0.5, solarize_prob=0.2)


def drawn(view: View, width: int = 4000, height: int = 3000, *, seed: int = 1, epoch: int = 0) -> NDArray[np.void]:
    """(DRAWS,) of PARAMS: samples 0, 1, 2 ..."""
    kernel = Kernel([view], seed=seed)
    kernel.set_epoch(epoch)
    return kernel.draw(np.arange(DRAWS), np.full(DRAWS, width), np.full(DRAWS, height))[0]


def assert_uniform(values: ArrayLike, low: float, high: float) -> None:
    """Kolmogorov-Smirnov against the uniform law; 1.95 / sqrt(n) is its 0.1 % critical value."""
    ordered = np.sort((np.asarray(values) - low) / (high - low))
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(len(ordered))


def assert_happens(events: ArrayLike, probability: float) -> None:
    """Within 3.3 standard deviations (0.1 %) of a binomial's mean."""
    spread = math.sqrt(probability * (1 - probability) / DRAWS)
    assert abs(np.mean(events) - probability) <= 3.3 * spread


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_generator_gives_random123s_known_answers(counter: list[int], key: int, answer: list[int]) -> None:
    words, out = np.array(counter, np.uint32), np.zeros(4, np.uint32)
    LIB.views_philox(words.ctypes.data, key, out.ctypes.data)
    assert out.tolist() == answer


def test_area_is_uniform_and_aspect_log_uniform() -> None:
    left, top, right, bottom = drawn(VIEW)["box"].T
    width, height = right - left, bottom - top
    assert_uniform(width * height / 12e6, 0.05, 0.3)
    assert_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3))


def test_position_is_uniform_and_inside_the_image() -> None:
    params = drawn(VIEW)
    left, top, right, bottom = params["box"].T
    assert_uniform(left / (4000 - (right - left)), 0, 1)
    assert_uniform(top / (3000 - (bottom - top)), 0, 1)
    assert (params["box"] == params["limit"]).all()
    assert (left.min(), top.min()) >= (0, 0)
    assert (right.max(), bottom.max()) <= (4000, 3000)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (320, 500), (90, 77)])
def test_crops_that_may_be_rejected_follow_torchvisions_law(width: int, height: int) -> None:
    """Two-sample Kolmogorov-Smirnov on area and aspect where many first tries do not fit."""
    torch.manual_seed(3)
    image = torch.empty(3, height, width)
    reference = np.array([RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    box = drawn(View(size=32, scale=(0.3, 1.0)), width, height)["box"]
    ours_w, ours_h = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    for ours, theirs in ((ours_w * ours_h, reference[:, 2] * reference[:, 3]), (ours_w, reference[:, 3])):
        grid = np.union1d(ours, theirs)
        at = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (ours, theirs)]
        assert np.abs(at[0] - at[1]).max() < 1.95 * math.sqrt(1 / DRAWS + 1 / 4000)


@pytest.mark.parametrize(("width", "height"), [(1000, 50), (40, 900), (1, 1), (1, 500)])
def test_an_image_too_narrow_for_any_crop_gets_torchvisions_centre_crop(width: int, height: int) -> None:
    box = drawn(View(size=32, scale=(0.99, 1.0)), width, height)["box"][0]
    top, left, crop_h, crop_w = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.99, 1.0], [3 / 4, 4 / 3])
    assert box.tolist() == [left, top, left + crop_w, top + crop_h]


def test_every_choice_happens_as_often_as_asked() -> None:
    params = drawn(VIEW)
    for name, probability in (("flip", 0.5), ("jitter", 0.8), ("gray", 0.2), ("solarize", 0.2)):
        assert_happens(params[name], probability)
    assert_happens(params["sigma"] > 0, 0.5)
    pairs = np.corrcoef([params["flip"], params["jitter"], params["gray"], params["sigma"] > 0, params["solarize"]])
    assert np.abs(pairs - np.eye(5)).max() < 3.3 / math.sqrt(DRAWS)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_probabilities_of_zero_and_one_are_certain(probability: float) -> None:
    names = ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob")
    params = drawn(View(size=32, scale=(0.1, 1.0), **dict.fromkeys(names, probability)))
    for name in ("flip", "jitter", "gray", "solarize"):
        assert (params[name] == probability).all()
    assert ((params["sigma"] > 0) == probability).all()


def test_strengths_are_uniform_in_torchvisions_ranges() -> None:
    params = drawn(View(size=32, scale=(0.1, 1.0), brightness=0.4, contrast=1.7, saturation=0.0, hue=0.2))
    assert_uniform(params["factor"][:, 0], 0.6, 1.4)
    assert_uniform(params["factor"][:, 1], 0.0, 2.7)
    assert (params["factor"][:, 2] == 1).all()
    assert_uniform(params["factor"][:, 3], -0.2, 0.2)
    assert_uniform(params["sigma"][params["sigma"] > 0], 0.1, 2.0)


def test_all_orders_of_the_colour_operations_are_equally_likely() -> None:
    orders, counts = np.unique(drawn(VIEW)["order"], axis=0, return_counts=True)
    assert len(orders) == 24
    assert (np.sort(orders, axis=1) == [0, 1, 2, 3]).all()
    expected = DRAWS / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-square, 23 degrees of freedom, 0.1 %


def test_neighbouring_seeds_epochs_samples_and_views_are_unrelated() -> None:
    def areas(seed: int = 1, epoch: int = 0) -> NDArray[np.float64]:
        box = drawn(VIEW, seed=seed, epoch=epoch)["box"]
        return np.asarray((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]))

    two = Kernel([VIEW, VIEW], seed=1).draw(np.arange(DRAWS), np.full(DRAWS, 4000), np.full(DRAWS, 3000))["box"][1]
    others = [areas(seed=2), areas(epoch=1), np.roll(areas(), 1), (two[:, 2] - two[:, 0]) * (two[:, 3] - two[:, 1])]
    for other in others:
        assert abs(np.corrcoef(areas(), other)[0, 1]) < 3.3 / math.sqrt(DRAWS)


def test_parameters_do_not_depend_on_the_other_samples_or_on_earlier_calls() -> None:
    kernel = Kernel([VIEW, VIEW], seed=9)
    many = kernel.draw([5, 2**40, 7], [400, 300, 200], [300, 300, 300])
    alone = Kernel([VIEW, VIEW], seed=9).draw([2**40], [300], [300])
    assert many[:, 1].tobytes() == alone[:, 0].tobytes()
    assert many[0].tobytes() != many[1].tobytes()


def test_another_probability_shifts_no_other_parameter() -> None:
    base, other = drawn(VIEW), drawn(View(size=32, scale=(0.05, 0.3), jitter_prob=0.1, blur_prob=0.9))
    for name in ("box", "flip", "gray", "factor", "order"):
        assert (base[name] == other[name]).all()


def test_the_evaluation_view_draws_nothing() -> None:
    kernel = Kernel([CenterView(size=64, resize=64)])
    params = kernel.draw([1, 2], [100, 100], [64, 64])[0]
    assert params[0].tobytes() == params[1].tobytes()
    assert params.dtype == PARAMS
    assert params["box"][0].tolist() == [18, 0, 82, 64]


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"scale": (0.0, 1.0)}, {"scale": (0.5, 0.4)}, {"flip_prob": 1.5}, {"hue": 0.6},
     {"blur_sigma": (0.0, 1.0)}],
)  # fmt: skip
def test_a_view_that_cannot_be_cut_is_refused_by_name(wrong: dict[str, object]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=name):
        View(**{"size": 32, "scale": (0.1, 1.0), **wrong})  # type: ignore[arg-type]
