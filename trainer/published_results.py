"""What the SSLight paper reports, to stand beside ours. source: its repository's README; ImageNet-1k, 200 epochs."""

from collections.abc import Iterator

PUBLISHED = "SSLight, ICLR 2023: ImageNet-1k, 200 epochs; COCO 2017, 1x schedule"

RESULTS: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("dino", "vit_tiny_patch16_224"): {"linear": (66.7, 69.5)},
    ("dino", "resnet18"): {
        "linear": (62.2, 65.7),
        "semi1": (44.5, 49.8),
        "semi10": (59.2, 63.0),
        "detection": (32.7, 34.1),
        "segmentation": (30.6, 31.8),
    },
    ("dino", "resnet34"): {
        "linear": (67.7, 69.7),
        "semi1": (52.4, 55.2),
        "semi10": (65.4, 67.2),
        "detection": (37.6, 38.6),
        "segmentation": (34.6, 35.5),
    },
    ("dino", "mobilenetv2_100"): {
        "linear": (66.2, 68.3),
        "semi1": (47.9, 50.6),
        "semi10": (61.3, 63.5),
        "detection": (30.9, 32.1),
        "segmentation": (28.1, 29.1),
    },
    ("swav", "mobilenetv2_100"): {"linear": (65.2, 67.3)},
    ("moco", "mobilenetv2_100"): {"linear": (60.6, 61.6)},
}
"""(method, timm name) -> protocol -> (baseline views, SSLight views), top-1 or AP in percent."""


def published_for(method: str, network: str) -> Iterator[list[str]]:
    """Rows of method, network, views, protocol and figure."""
    for protocol, figures in RESULTS.get((method, network), {}).items():
        for views, figure in zip(("baseline", "SSLight"), figures, strict=True):
            yield [method, network, views, protocol, str(figure)]
