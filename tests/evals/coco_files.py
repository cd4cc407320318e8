"""Small drawn pictures in COCO's layout and format: rectangles and triangles as polygons, and crowds as run lengths."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = [{"id": 3, "name": "rectangle"}, {"id": 17, "name": "triangle"}]
"""With gaps, as COCO's own numbers have."""


def write_coco(folder: Path, split: str, *, number: int, seed: int = 0) -> Path:
    """Pictures of about 64 x 48 pixels; the third has a crowd besides, the fourth nothing. Returns the annotations."""
    random = np.random.default_rng(seed)
    images, objects = [], []
    (folder / split).mkdir(parents=True)
    for index in range(number):
        image_id = 1000 - 7 * index  # their order in the file is not that of their ids
        width, height = int(random.integers(60, 80)), int(random.integers(44, 60))
        picture = Image.new("RGB", (width, height), (90, 120, 90))
        drawn = [] if index == 3 else [_object(random, picture) for _ in range(int(random.integers(1, 4)))]
        drawn += [_crowd(width, height)] if index == 2 else []
        picture.save(folder / split / f"{image_id:012d}.jpg", quality=95)
        images.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": width, "height": height})
        objects += [{"image_id": image_id, "iscrowd": 0, **each} for each in drawn]
    objects = [{"id": number, **each} for number, each in enumerate(objects, 1)]
    path = folder / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": CATEGORIES}))
    return path


def _object(random: np.random.Generator, picture: Image.Image) -> dict[str, Any]:
    x, y = (int(random.integers(0, side - 24)) for side in picture.size)
    w, h = int(random.integers(14, 24)), int(random.integers(14, 24))
    rectangle = bool(random.integers(2))
    corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)] if rectangle else [(x, y + h), (x + w, y + h), (x, y)]
    ImageDraw.Draw(picture).polygon(corners, fill=(220, 60, 40) if rectangle else (40, 60, 230))
    return {
        "category_id": 3 if rectangle else 17,
        "bbox": [x, y, w, h],
        "area": w * h if rectangle else w * h / 2,
        "segmentation": [[float(number) for corner in corners for number in corner]],
    }


def _crowd(width: int, height: int) -> dict[str, Any]:
    """The right half of the picture; run lengths go down the columns, and begin with what is not the object."""
    left = width // 2
    counts = [left * height, (width - left) * height]
    return {
        "category_id": 3, "iscrowd": 1, "bbox": [left, 0, width - left, height], "area": counts[1],
        "segmentation": {"counts": counts, "size": [height, width]},
    }  # fmt: skip
