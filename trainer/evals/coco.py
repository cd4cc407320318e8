"""COCO: images with boxes and masks, and average precision as pycocotools computes it."""

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from trainer.recipe import RecipeError

MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""The first six numbers of pycocotools, in its order; in percent here."""
NAMES = {"bbox": "box", "segm": "mask"}
"""What our measures are called, by what pycocotools calls them."""


Sample = tuple[Tensor, dict[str, Tensor]]


class CocoImages(Dataset[Sample]):
    """The images of an annotation file in COCO's format, in the order of their ids.

    annotations: such as annotations/instances_val2017.json; the images lie in a folder beside it, here val2017
    train: leave out images without objects, and read masks
    raises: RecipeError if a file or folder is not there, or is not COCO's
    """

    def __init__(self, annotations: Path, *, train: bool, masks: bool) -> None:
        self.annotations, self.train, self.masks = annotations, train, masks
        self.folder = _images_of(annotations)
        self.coco = _read(annotations)
        self.categories: list[int] = sorted(self.coco.getCatIds())
        self.numbers = {category: number for number, category in enumerate(self.categories, 1)}
        self.ids = [i for i in sorted(self.coco.imgs) if not train or self._objects(i)]
        if not self.ids:
            raise RecipeError(f"{annotations}: holds no image{' with objects' if train else ''}; nothing to do")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: tuple[int, bool]) -> Sample:
        """An image and its objects; crowds are none.

        which: its index, and whether to mirror it
        returns: (3, H, W) in [0, 1]; boxes (N, 4) as x0 y0 x1 y1, labels (N,) from 1, masks (N, H, W), image_id
        """
        index, mirror = which
        image_id = self.ids[index]
        image = self._pixels(self.coco.imgs[image_id])
        objects = self._objects(image_id)
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.numbers[each["category_id"]] for each in objects], dtype=torch.long)
        target = {"boxes": boxes, "labels": labels, "image_id": torch.tensor(image_id)}
        if self.masks and self.train:
            target["masks"] = self.masks_of(image_id)
        return _mirror(image, target) if mirror else (image, target)

    def _pixels(self, described: dict[str, Any]) -> Tensor:
        path = self.folder / described["file_name"]
        try:
            with Image.open(path) as file:
                image: Tensor = pil_to_tensor(file.convert("RGB")).float() / 255
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error}; {self.annotations} names it") from error
        if image.shape[1:] != (described["height"], described["width"]):
            wanted, came = (described["width"], described["height"]), (image.shape[2], image.shape[1])
            raise RecipeError(f"{path}: {came} pixels, and {self.annotations} says {wanted}; its boxes would not fit")
        return image

    def _objects(self, image_id: int) -> list[dict[str, Any]]:
        """The objects that a detector can learn from: no crowd, and a box with an area."""
        every: list[dict[str, Any]] = self.coco.imgToAnns[image_id]
        return [each for each in every if not each.get("iscrowd", 0) and min(each["bbox"][2:]) > 0]

    def masks_of(self, image_id: int) -> Tensor:
        """(N, H, W) of 0 and 1, one an object, in the order of its boxes."""
        masks = [torch.from_numpy(self.coco.annToMask(each)) for each in self._objects(image_id)]
        described = self.coco.imgs[image_id]
        empty = torch.zeros((0, described["height"], described["width"]), dtype=torch.uint8)
        return torch.stack(masks) if masks else empty


def _images_of(annotations: Path) -> Path:
    """instances_NAME.json lies in annotations/, NAME/ beside that."""
    if not annotations.is_file() or annotations.suffix != ".json":
        came = "no such file" if annotations.suffix == ".json" else "not COCO annotations"
        raise RecipeError(f"{annotations}: {came}; give data.train and data.val such as .../instances_val2017.json")
    folder = annotations.parent.parent / annotations.stem.split("_", 1)[-1]
    if not folder.is_dir():
        raise RecipeError(f"{annotations}: its images were looked for in {folder}, which is no folder; put them there")
    return folder


def _read(annotations: Path) -> COCO:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
            coco = COCO(str(annotations))
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError, AssertionError) as error:
        raise RecipeError(f"{annotations}: not in COCO's format: {error!r}") from None
    if not coco.cats or not coco.imgs:
        raise RecipeError(f"{annotations}: names no categories or no images; wanted COCO's instances file")
    return coco


def _mirror(image: Tensor, target: dict[str, Tensor]) -> Sample:
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    flipped = target | {"boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped


def as_results(dataset: CocoImages, image_id: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One image's detections as COCO's results format has them.

    found: boxes (N, 4) as x0 y0 x1 y1, labels (N,) from 1, scores (N,), and masks (N, 1, H, W) where there are any
    """
    boxes = found["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    results = [
        {"image_id": image_id, "category_id": dataset.categories[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ]
    for result, mask in zip(results, found.get("masks", ()), strict=False):
        encoded = rle.encode(np.asfortranarray((mask[0] >= 0.5).cpu().numpy().astype(np.uint8)))
        result["segmentation"] = encoded | {"counts": encoded["counts"].decode()}
    return results


def average_precision(dataset: CocoImages, results: list[dict[str, Any]], kinds: Iterable[str]) -> dict[str, float]:
    """COCO's measures in percent, box_AP, mask_AP ...; without those that have no object to be measured on.

    kinds: of "bbox" and "segm"
    """
    measures: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind in kinds:
            evaluation = COCOeval(dataset.coco, _found(dataset.coco, results, kind), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats = zip(MEASURES, evaluation.stats, strict=False)
            measures |= {f"{NAMES[kind]}_{name}": 100 * float(value) for name, value in stats if value >= 0}
    return measures


def _found(truth: COCO, results: list[dict[str, Any]], kind: str) -> COCO:
    """The results as pycocotools wants them."""
    if results:
        # beside a box, it would take the box's area for the mask's, and small objects for others
        without = "segmentation" if kind == "bbox" else "bbox"
        return truth.loadRes([{key: each[key] for key in each if key != without} for each in results])
    nothing = COCO()
    nothing.dataset = {"images": truth.dataset["images"], "categories": truth.dataset["categories"], "annotations": []}
    nothing.createIndex()
    return nothing
