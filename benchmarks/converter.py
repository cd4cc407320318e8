"""How many images a second become a .beton: data_prep against FFCV's own DatasetWriter.

python -m benchmarks.converter FOLDER [--images 400] [--rounds 5] [--workers N] [--max-size 500] [--quality 90]

Every case converts the same files of FOLDER (again and again until there are enough), with the same settings and number
of processes; the cases take turns in every round. Measured is wall-clock time from the list of files to the finished
file: starting the processes, checksums and checks included, importing ffcv not. FFCV's dataset decodes with Pillow, as
torchvision's ImageFolder does. One JSON line a case: the median and range of images per second, and the median over
rounds of its ratio to FFCV. `same_bytes`: every stored image is byte for byte FFCV's.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.convert import convert
from data_prep.images import BadImageError, Encoding, decode_with_pillow
from data_prep.pool import num_cores
from data_prep.schema import read_samples
from data_prep.sources import Item, Listing, list_source

Case = Callable[[Path], object]
"""Writes a .beton under the name given."""
FFCV = "ffcv DatasetWriter"
OURS = "data_prep, speed profile"


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    listing = take(list_source(args.folder, unlabelled=True), args.folder, args.images)
    cases = all_cases(listing, args)
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(args.rounds + 1):  # the first round warms the file cache and does not count
            for name, case in cases.items():
                taken = timed(case, Path(folder) / f"{turn}-{len(name)}.beton")
                if turn > 0:
                    seconds[name].append(taken)
        same = stored_images(cases[FFCV], Path(folder)) == stored_images(cases[OURS], Path(folder))
    for line in report(seconds, len(listing.items), args, same):
        print(json.dumps(line), flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=num_cores())
    parser.add_argument("--max-size", type=int, default=500)
    parser.add_argument("--quality", type=int, default=90)
    return parser.parse_args(argv)


def take(listing: Listing, folder: Path, count: int) -> Listing:
    """So many images that Pillow reads: FFCV's writer waits for ever on any other."""
    sound = [item for item in listing.items[:count] if is_sound((folder / item.name).read_bytes())]
    items = [replace(item, label=0) for item in islice(cycle(sound), count)]
    return replace(listing, items=items, classes=("all",))


def is_sound(data: bytes) -> bool:
    try:
        decode_with_pillow(data)
    except BadImageError:
        return False
    return True


class ImageFiles:
    """What FFCV's writer converts: pixels and a label by index."""

    def __init__(self, folder: Path, items: Sequence[Item]) -> None:
        self._paths = [folder / item.name for item in items]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        with Image.open(self._paths[index]) as image:
            return np.asarray(image.convert("RGB")), 0


def all_cases(listing: Listing, args: argparse.Namespace) -> dict[str, Case]:
    # Not above: every worker process of data_prep imports this module too, as multiprocessing has it.
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    dataset = ImageFiles(args.folder, listing.items)
    speed, fidelity = Encoding(args.max_size, args.quality), Encoding(None, args.quality, copy_jpeg=True)

    def with_ffcv(out: Path) -> None:
        image = RGBImageField("jpg", max_resolution=args.max_size, jpeg_quality=args.quality)
        writer = DatasetWriter(str(out), {"image": image, "label": IntField()}, num_workers=args.workers)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            writer.from_indexed_dataset(dataset, chunksize=16)

    return {
        FFCV: with_ffcv,
        OURS: lambda out: convert(listing, out, encoding=speed, workers=args.workers),
        "data_prep, fidelity profile (ffcv has none)": lambda out: convert(
            listing, out, encoding=fidelity, workers=args.workers
        ),
    }


def timed(case: Case, out: Path) -> float:
    os.sync()
    started = time.perf_counter()
    case(out)
    return time.perf_counter() - started


def stored_images(case: Case, folder: Path) -> list[bytes]:
    out = folder / f"check-{time.monotonic_ns()}.beton"
    case(out)
    return [data for _, data in read_samples(out)]


Line = dict[str, object]


def report(seconds: dict[str, list[float]], count: int, args: argparse.Namespace, same: bool) -> list[Line]:
    """One line a case."""
    lines: list[Line] = []
    for name, taken in seconds.items():
        rates = sorted(count / value for value in taken)
        ratios = [theirs / ours for theirs, ours in zip(seconds[FFCV], taken, strict=True)]
        line: Line = {
            "case": name,
            "workers": args.workers,
            "images": count,
            "rounds": args.rounds,
            "images_per_s": round(statistics.median(rates), 1),
            "lowest": round(rates[0], 1),
            "highest": round(rates[-1], 1),
            "ratio_to_ffcv": round(statistics.median(ratios), 2),
        }
        lines.append({**line, "same_bytes": same} if name == OURS else line)
    return lines


if __name__ == "__main__":
    main()
