"""The embedded data set: labelled scenes drawn in code, the same on every run, to try everything without a download."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from data_prep.kinds import CLASSES, KINDS
from data_prep.pool import ordered_map, split_evenly
from data_prep.progress import Meter
from data_prep.scenes import draw_scene
from data_prep.sources import SourceError

CHUNK_SIZE = 32
MARKER = "synth.json"
"""Says that a folder was drawn by this module, and how."""
DRAWING_VERSION = 1
"""Goes up whenever the same plan gives other pictures."""


@dataclass(frozen=True)
class Plan:
    """What to draw."""

    train_per_class: int = 400
    val_per_class: int = 100
    seed: int = 0
    size: tuple[int, int] = (96, 160)
    """Shortest and longest side in pixels."""
    quality: tuple[int, int] = (75, 95)
    """Of the JPEG files, drawn anew for each."""

    def __post_init__(self) -> None:
        if self.train_per_class < 1 or self.val_per_class < 0:
            raise ValueError(
                f"synth needs 1 or more images a class for train and 0 or more for val, got "
                f"{self.train_per_class} and {self.val_per_class}"
            )
        if not 32 <= self.size[0] <= self.size[1] <= 4096:
            raise ValueError(f"--size must be two sides with 32 <= MIN <= MAX <= 4096 pixels, got {self.size}")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")

    def marker(self) -> str:
        """Identity of the data set, as written to its marker file."""
        return json.dumps({"drawing_version": DRAWING_VERSION, "classes": CLASSES, **asdict(self)}, indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class Picture:
    """One file to draw."""

    split: str
    label: int
    index: int

    @property
    def name(self) -> str:
        return f"{self.split}/{CLASSES[self.label]}/{self.index:05d}.jpg"


def draw_dataset(out: Path, plan: Plan, *, workers: int = 1, overwrite: bool = False) -> int:
    """Draw OUT/{train,val}/CLASS/*.jpg; the folder appears only once it is complete.

    returns: number of images, 0 where `out` holds this very data set already
    raises: SourceError where `out` holds something else
    """
    pictures = list(_pictures(plan))
    if out.exists() and _is_done(out, plan, len(pictures), overwrite):
        return 0
    draft = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        for folder in sorted({str(Path(picture.name).parent) for picture in pictures}):
            (draft / folder).mkdir(parents=True)
        _draw_all(draft, plan, pictures, workers)
        (draft / MARKER).write_text(plan.marker())
        if out.exists():
            shutil.rmtree(out)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return len(pictures)


def draw_jpeg(plan: Plan, picture: Picture) -> bytes:
    """A picture as JPEG: a pure function of the plan and of the picture's split, class and index."""
    rng = np.random.default_rng([plan.seed, zlib.crc32(picture.split.encode()), picture.label, picture.index])
    pixels = draw_scene(KINDS[CLASSES[picture.label]], rng, min_side=plan.size[0], max_side=plan.size[1])
    quality = int(rng.integers(*plan.quality, endpoint=True))
    done, encoded = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return encoded.tobytes()


def _pictures(plan: Plan) -> Iterator[Picture]:
    for split, count in (("train", plan.train_per_class), ("val", plan.val_per_class)):
        for label in range(len(CLASSES)):
            yield from (Picture(split, label, index) for index in range(count))


def _is_done(out: Path, plan: Plan, wanted: int, overwrite: bool) -> bool:
    """Whether `out` is what would be drawn; refuses to touch what synth did not draw."""
    if out.is_dir() and not any(out.iterdir()):
        return False
    marker = out / MARKER
    if not marker.is_file():
        raise SourceError(f"{out}: exists and was not drawn by synth (no {MARKER}); choose another folder")
    found = sum(1 for _ in out.glob("*/*/*.jpg"))
    if marker.read_text() == plan.marker() and found == wanted:
        return True
    if not overwrite:
        what = "with other settings" if found == wanted else f"but holds {found} of {wanted} images of this plan"
        raise SourceError(f"{out}: was drawn by synth {what}; choose another folder, or give --overwrite")
    return False


def _draw_all(root: Path, plan: Plan, pictures: Sequence[Picture], workers: int) -> None:
    results = ordered_map(
        draw_chunk,
        split_evenly(pictures, CHUNK_SIZE),
        workers=workers,
        preload=__name__,
        start=start_worker,
        start_args=(root, plan),
    )
    with closing(results), Meter("synth", len(pictures)) as meter:
        for drawn in results:
            meter.advance(drawn)


_job: tuple[Path, Plan] | None = None


def start_worker(root: Path, plan: Plan) -> None:
    """Prepare a worker process: where to write, what to draw."""
    global _job
    cv2.setNumThreads(1)  # one process a core already
    _job = root, plan


def draw_chunk(pictures: Sequence[Picture]) -> int:
    """In a worker process: draw and write these pictures; returns how many."""
    assert _job is not None
    root, plan = _job
    for picture in pictures:
        (root / picture.name).write_bytes(draw_jpeg(plan, picture))
    return len(pictures)
