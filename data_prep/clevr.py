"""CLEVR: how many objects an image shows, or how near the nearest is, as classes; read from the scenes beside it.

source: VISSL extra_scripts/datasets/create_clevr_{count,dist}_data_files.py, whose names of classes these are
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.folders import list_folder, split_folder
from data_prep.listing import Listing, SourceError
from data_prep.names import some

COUNTS = range(3, 11)
"""Numbers of objects in the images of CLEVR_v1.0: the 8 classes of Clevr/Count."""
MORE_COUNTS = range(1, 11)
"""Those of other renders; so many objects have their own classes too."""
DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
"""Upper ends of the classes, included."""
LABELS = ("clevr_count", "clevr_dist")


def list_clevr(root: Path, labels: str, *, name: str, split: str | None = None) -> Listing:
    """List the images of images/ or images/SPLIT/, labelled by their scenes.

    Scenes are scenes/CLEVR_SPLIT_scenes.json, as CLEVR_v1.0 has them, or all of scenes/*.json, or scenes.json.
    raises: SourceError where an image has no scene, or its scene no class
    """
    if not (root / "images").is_dir():
        raise SourceError(f"{root}: has no folder images; --labels {labels} needs CLEVR's images/ and scenes/")
    images = list_folder(split_folder(root / "images", split), name=name)
    scenes = _read_scenes(root, split)
    missing = [item.name for item in images.items if item.name not in scenes]
    if missing:
        raise SourceError(
            f"{root}: {len(missing)} of {len(images.items)} images have no scene ({some(missing)}); add their scene "
            "files, or take the images away (CLEVR_v1.0 has none for its test split)"
        )
    depths = [scenes[item.name] for item in images.items]
    numbers, classes, notes = _by_count(root, depths) if labels == "clevr_count" else _by_distance(root, depths)
    items = [replace(item, label=number) for item, number in zip(images.items, numbers, strict=True)]
    return replace(images, items=items, classes=classes, notes=notes)


Labels = tuple[list[int], tuple[str, ...], tuple[str, ...]]
"""A label for each image, the names of the classes, and notes."""


def _by_count(root: Path, depths: Sequence[Sequence[float]]) -> Labels:
    counts = [len(each) for each in depths]
    if not set(counts) <= set(MORE_COUNTS):
        raise SourceError(f"{root}: images show {min(counts)} to {max(counts)} objects; clevr_count knows 1 to 10")
    known, notes = COUNTS, tuple[str, ...]()
    if not set(counts) <= set(COUNTS):
        known = MORE_COUNTS
        notes = ("some images show 1 or 2 objects, so there are 10 classes, where Clevr/Count (3 to 10) has 8",)
    return [count - known.start for count in counts], tuple(f"count_{count}" for count in known), notes


def _by_distance(root: Path, depths: Sequence[Sequence[float]]) -> Labels:
    nearest = [min(each, default=float("inf")) for each in depths]
    if not max(nearest) <= DISTANCES[-1]:
        raise SourceError(
            f"{root}: an image shows no object nearer than {DISTANCES[-1]:g}, or none; clevr_dist has no class for it"
        )
    return [bisect_left(DISTANCES, each) for each in nearest], tuple(f"below_{each}" for each in DISTANCES), ()


def _read_scenes(root: Path, split: str | None) -> dict[str, tuple[float, ...]]:
    """The depth of every object in every image, by the image's file name."""
    published = root / "scenes" / f"CLEVR_{split}_scenes.json"
    files = [published] if published.is_file() else sorted((root / "scenes").glob("*.json"))
    files = files or [path for path in (root / "scenes.json",) if path.is_file()]
    if not files:
        raise SourceError(f"{root}: has neither scenes/*.json nor scenes.json; copy them beside images/")
    scenes: dict[str, tuple[float, ...]] = {}
    for path in files:
        for name, depths in _read_file(path):
            if scenes.setdefault(name, depths) != depths:
                raise SourceError(f"{path}: says of {name} something else than a scene file before it; remove one")
    return scenes


def _read_file(path: Path) -> list[tuple[str, tuple[float, ...]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [
            (scene["image_filename"], tuple(float(thing["pixel_coords"][2]) for thing in scene["objects"]))
            for scene in content.get("scenes", [content])
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SourceError(f"{path}: not a CLEVR scene file ({error!r}); fetch it again") from error
