"""A linear probe on cached features against the plain loop: the same images, the same frozen network, one thread each.

python -m benchmarks.linear FOLDER WEIGHTS [--size 64] [--epochs 100] [--every 1]

FOLDER has train/CLASS/*.jpg and val/CLASS/*.jpg; WEIGHTS is a weights folder, such as runs/NAME/weights/student. Cached
is what `trainer evaluate --protocol linear_cached` does: features once, logistic regression, its weight decay chosen by
cross-validation on train. Plain is torchvision's ImageFolder and SGD with a cosine: every epoch decodes every image
with Pillow, cuts its centre, runs the network and trains a linear layer. Its rate and weight decay, and whether a
BatchNorm without weights stands before the layer, are the best on a held-out tenth of train; that search runs on cached
features and is not counted. Neither is the conversion, which is printed by itself. One JSON line a case: CPU seconds of
all threads and processes, wall seconds, accuracy on val; of the plain loop also how many times as long it took.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from trainer import weights
from trainer.data import multicrop  # noqa: F401  (imported late otherwise: 7 s of start-up that are no work of the probe)
from trainer.evals.features import Features, ImageReader
from trainer.evals.linear import folds, linear_accuracy

T = TypeVar("T")
Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
"""Features (B, D) and labels (B,) of an epoch."""
BATCH = 64


@dataclass(frozen=True)
class Choice:
    """How the plain loop trains."""

    rate: float
    normalised: bool
    weight_decay: float


CHOICES = [Choice(*each) for each in itertools.product((0.003, 0.01, 0.03, 0.1), (False, True), (0.0, 1e-3))]


@dataclass(frozen=True)
class Timed:
    """What a piece of work took."""

    cpu_s: float
    """Of all threads and processes."""
    wall_s: float


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1)
    network, config = weights.load_backbone(args.weights)
    network.eval()
    usual = config["pretrained_cfg"]
    with tempfile.TemporaryDirectory() as temporary:
        betons = [Path(temporary) / f"{split}.beton" for split in ("train", "val")]
        say("convert", timed(lambda: convert(args.folder, betons))[1])
        (top1, train), cached = timed(lambda: cached_probe(network, betons, usual, args))
    say("cached", cached, images=len(train.labels), top1=top1)
    choice = choose(train, args.epochs)
    top1, plain = timed(lambda: plain_probe(network, choice, usual, args))
    ratios = {"cpu_ratio": plain.cpu_s / cached.cpu_s, "wall_ratio": plain.wall_s / cached.wall_s}
    say("plain", plain, images=len(train.labels), top1=top1, **asdict(choice), **ratios)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--size", type=int, default=64, help="pixels: shorter side, and centre crop")
    parser.add_argument("--epochs", type=int, default=100, help="of the plain loop")
    parser.add_argument("--every", type=int, default=1, help="take every N-th train image")
    return parser.parse_args(argv)


def timed(work: Callable[[], T]) -> tuple[T, Timed]:
    """What it returns, and what it took."""
    before = os.times()
    result = work()
    after = os.times()
    return result, Timed(sum(after[:4]) - sum(before[:4]), after.elapsed - before.elapsed)


def say(case: str, took: Timed, **values: Any) -> None:
    line = {"case": case, **asdict(took), **values}
    print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in line.items()}), flush=True)


def convert(folder: Path, betons: Sequence[Path]) -> None:
    for beton in betons:
        command = ["convert", str(folder), str(beton), "--split", beton.stem, "--copy-jpeg"]
        subprocess.run([sys.executable, "-m", "data_prep", *command], check=True, stdout=sys.stderr)


def cached_probe(
    network: nn.Module, betons: Sequence[Path], usual: dict[str, Any], args: argparse.Namespace
) -> tuple[float, Features]:
    """Top-1 of linear_cached, and the train images' features."""
    reader = ImageReader(
        size=args.size, resize=args.size, batch_size=256, num_workers=1, mean=usual["mean"], std=usual["std"],
        device=torch.device("cpu"),
    )  # fmt: skip
    every = range(0, len(ImageFolder(args.folder / "train")), args.every)
    train = reader.features({"it": network}, betons[0], every)["it"]
    val = reader.features({"it": network}, betons[1])["it"]
    return linear_accuracy(train, val)["top1"], train


def choose(train: Features, epochs: int) -> Choice:
    """The best on the held-out tenth, of a linear layer trained on the other nine."""
    held_out, rest = folds(len(train.labels), 10)[0]
    vectors, labels = train.vectors[rest], train.labels[rest]

    def shuffled(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        return ((vectors[ids], labels[ids]) for ids in order.split(BATCH))

    def accuracy(choice: Choice) -> float:
        head = train_head(shuffled, choice, epochs, width=vectors.shape[1], num_classes=int(labels.max()) + 1)
        return top1_of(head, [(train.vectors[held_out], train.labels[held_out])])

    return max(CHOICES, key=accuracy)


def train_head(batches: Batches, choice: Choice, epochs: int, *, width: int, num_classes: int) -> nn.Module:
    """SGD with momentum 0.9; its rate falls to 0 by half a cosine, once an epoch."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(width, affine=False) if choice.normalised else nn.Identity()
    head = nn.Sequential(norm, nn.Linear(width, num_classes)).train()
    optimizer = torch.optim.SGD(head.parameters(), choice.rate, momentum=0.9, weight_decay=choice.weight_decay)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = choice.rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for features, labels in batches(epoch):
            loss = F.cross_entropy(head(features), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return head.eval()


@torch.no_grad()
def top1_of(head: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Percent right."""
    hits = torch.cat([head(features).argmax(1) == labels for features, labels in batches])
    return float(hits.float().mean()) * 100


def plain_probe(network: nn.Module, choice: Choice, usual: dict[str, Any], args: argparse.Namespace) -> float:
    """Top-1 after training on images that every epoch decodes anew."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(args.size, bicubic), transforms.CenterCrop(args.size), transforms.ToTensor()]
    change = transforms.Compose([*steps, transforms.Normalize(usual["mean"], usual["std"])])
    train, val = (ImageFolder(args.folder / split, change) for split in ("train", "val"))
    subset = Subset(train, range(0, len(train), args.every))
    loader = DataLoader(subset, BATCH, shuffle=True, drop_last=len(subset) % BATCH == 1)

    def features(images: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
        for batch, labels in images:
            with torch.no_grad():
                vectors = network(batch.contiguous(memory_format=torch.channels_last))
            yield vectors, labels

    width, num_classes = int(network(torch.zeros(1, 3, args.size, args.size)).shape[1]), len(train.classes)
    head = train_head(lambda epoch: features(loader), choice, args.epochs, width=width, num_classes=num_classes)
    return top1_of(head, features(DataLoader(val, BATCH)))


if __name__ == "__main__":
    main()
