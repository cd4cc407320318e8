"""Features of every image of a beton, each image counted once over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import distributed
from trainer.data.loader import ViewLoader
from trainer.data.photometric import to_float
from trainer.data.views import CenterView, View
from trainer.recipe import Evaluation, Recipe


@dataclass(frozen=True)
class Features:
    """Every image's feature and label, in the order of the beton, the same on every rank."""

    vectors: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N,) int64; -1 where there is none."""


class Pixels(nn.Module):
    """The image itself, shrunk to `side` x `side`, as a feature: what a network must beat to have learnt anything."""

    def __init__(self, side: int = 16) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 3 * side * side)."""
        return F.adaptive_avg_pool2d(images, self.side).flatten(1)


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """How images of a beton become a network's input."""

    size: int
    resize: int
    batch_size: int
    num_workers: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    bf16: bool = False
    """Whether networks run under bfloat16 autocast."""
    on_bad_image: Literal["fail", "replace"] = "fail"
    """An evaluation counts every image once, so it fails."""

    def stated(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"size": self.size, "resize": self.resize} | ({"bf16": True} if self.bf16 else {})

    @torch.no_grad()
    def features(
        self,
        networks: dict[str, nn.Module],
        beton: Path,
        subset: Sequence[int] | None = None,
        *,
        view: View | None = None,
        seed: int = 0,
    ) -> dict[str, Features]:
        """Each network's features in eval mode, read in one pass over the data; modes are put back afterwards.

        view: a random one, drawn from the seed, instead of the centre
        """
        loader = ViewLoader(
            beton, [view or CenterView(size=self.size, resize=self.resize)], batch_size=self.batch_size, seed=seed,
            rank=distributed.rank(), world=distributed.world(), num_workers=self.num_workers, subset=subset,
            shuffle=False, drop_last=False, on_bad_image=self.on_bad_image,
        )  # fmt: skip
        was_training = {name: network.training for name, network in networks.items()}
        rows: dict[str, list[Tensor]] = {name: [] for name in networks}
        labels, sample_ids = [], []
        for network in networks.values():
            network.eval()
        for batch in loader.epoch(0):
            images = to_float(batch.views[0], self.device, self.mean, self.std)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                for name, network in networks.items():
                    rows[name].append(network(images).float())
            labels.append(batch.labels.clone())
            sample_ids.append(batch.sample_ids.clone())
        loader.close()
        for name, network in networks.items():
            network.train(was_training[name])
        return self._gather(rows, labels, sample_ids)

    def _gather(
        self, rows: dict[str, list[Tensor]], labels: list[Tensor], sample_ids: list[Tensor]
    ) -> dict[str, Features]:
        every_id = distributed.gather_rows(torch.cat(sample_ids).to(self.device))
        every_label = distributed.gather_rows(torch.cat(labels).to(self.device))
        order = every_id.argsort()
        return {
            name: Features(distributed.gather_rows(torch.cat(parts))[order], every_label[order])
            for name, parts in rows.items()
        }


def reader_of(recipe: Recipe | Evaluation, device: torch.device) -> ImageReader:
    """How the recipe's k-NN reads images."""
    knn = recipe.evals.knn
    return ImageReader(
        size=knn.size,
        resize=knn.resize,
        batch_size=knn.batch_size,
        num_workers=recipe.data.num_workers,
        mean=recipe.views.mean,
        std=recipe.views.std,
        device=device,
        bf16=recipe.evals.bf16,
    )
