"""Normalisation, and the photometric changes on the device against the kernel's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.data.pictures import difference, picture, plain_params
from trainer.data.kernel import PARAMS, Kernel
from trainer.data.loader import ViewLoader
from trainer.data.photometric import apply, to_float
from trainer.data.views import View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 48
STRONG = View(size=SIZE, scale=(0.1, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, solarize_prob=0.3)


def as_run(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """(N, S, S, 3) bytes as a run of one view: (1, N, 3, S, S), channels-last."""
    return torch.from_numpy(pixels)[None].permute(0, 1, 4, 2, 3)


def test_to_float_is_divide_subtract_divide() -> None:
    views = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    floats = to_float(views, torch.device("cpu"), MEAN, STD)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    expected = torch.cat([(view / 255 - mean) / std for view in views])
    assert floats.shape == (6, 3, 8, 8)
    assert floats.dtype == torch.float32
    assert floats.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(floats, expected, atol=1e-5, rtol=1e-5)


def test_to_float_leaves_the_views_as_they_are() -> None:
    views = as_run(np.stack([picture(8, 8)]))
    before = views.clone()
    to_float(views, torch.device("cpu"), MEAN, STD, dtype=torch.bfloat16)
    assert (views == before).all()


def drawn(count: int) -> NDArray[np.void]:
    """Parameters as a loader draws them, for images that need no resize."""
    params = Kernel([STRONG], seed=2).draw(np.arange(count), np.full(count, 500), np.full(count, 400))[0]
    params["box"], params["limit"], params["flip"] = (0, 0, SIZE, SIZE), (0, 0, SIZE, SIZE), 0
    return params


def test_the_device_makes_of_the_same_bytes_what_the_kernel_makes() -> None:
    params, kernel = drawn(120), Kernel([STRONG])
    images = np.stack([picture(SIZE, SIZE, seed) for seed in range(120)])
    ours = np.stack([kernel.render(image, row[None])[0][0] for image, row in zip(images, params, strict=True)])
    device = apply(as_run(images), params[None])[0].permute(0, 2, 3, 1).numpy()
    distance = difference(device, ours)
    assert (distance <= 1).mean() > 0.999
    assert distance.max() <= 4  # hue turns quickly where a pixel is nearly grey
    assert (ours != images).mean() > 0.8


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_device_blurs_views_smaller_than_the_blur(size: int) -> None:
    params, image = plain_params(size, size), picture(size, size, 1)
    params["sigma"] = 2.0
    ours = Kernel([View(size=size, scale=(0.1, 1.0))]).render(image, params)[0][0]
    device = apply(as_run(image[None]), params[None])[0, 0].permute(1, 2, 0).numpy()
    assert difference(device, ours).max() <= 1


def test_nothing_to_change_changes_nothing() -> None:
    images = np.stack([picture(SIZE, SIZE, seed) for seed in range(3)])
    assert (apply(as_run(images), np.zeros((1, 3), PARAMS)) == as_run(images)).all()


def test_a_loader_in_device_mode_agrees_with_one_on_the_cpu(beton: Path) -> None:
    views = [STRONG, STRONG, View(size=20, scale=(0.1, 0.4))]
    batches = []
    for mode in ("cpu", "device"):
        loader = ViewLoader(beton, views, batch_size=8, seed=1, photometric=mode)
        epoch = loader.epoch(0)
        batch = next(epoch)
        if mode == "device":
            assert batch.params is not None
            assert [run.shape for run in batch.params] == [(2, 8), (1, 8)]
            batch.views = [apply(run, params) for run, params in zip(batch.views, batch.params, strict=True)]
        batches.append([run.clone().numpy() for run in batch.views])
        epoch.close()
        loader.close()
    for cpu, device in zip(*batches, strict=True):
        distance = difference(device, cpu)
        assert distance.mean() < 0.5  # the device starts from rounded bytes, and strong jitter stretches that
        assert (distance <= 3).mean() > 0.99


def test_to_float_applies_the_parameters_it_is_given() -> None:
    images = np.stack([picture(SIZE, SIZE, seed) for seed in range(4)])
    cpu, params = torch.device("cpu"), drawn(4)[None]
    changed = to_float(apply(as_run(images), params), cpu, MEAN, STD)
    assert (to_float(as_run(images), cpu, MEAN, STD, params=params) == changed).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_agrees_with_the_cpu() -> None:
    images, params = np.stack([picture(SIZE, SIZE, seed) for seed in range(64)]), drawn(64)[None]
    cpu = apply(as_run(images), params)
    cuda = to_float(as_run(images).pin_memory(), torch.device("cuda"), (0, 0, 0), (1 / 255,) * 3, params=params)
    assert (cuda.cpu() - cpu[0]).abs().max() <= 1
