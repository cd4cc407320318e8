"""How many images a core turns into all their views: ours against everything one would use instead.

python -m benchmarks.loader FOLDER [--copy-jpeg] [--images 100] [--rounds 5] [--dali-python PYTHON] [--prototype DIR]

SSLight's views (2 x 224 of area 0.3 to 1, 6 x 128 of area 0.05 to 0.3). Every case starts from the same JPEGs, made by
data_prep from the images in FOLDER. Measured is CPU time, all threads together, so that waiting for a busy core does
not count; the cases take turns in every round. One JSON line a case: the median and range of images per second of one
core, and the median and range over rounds of its ratio to each peer. First come two lines on start-up and memory, from
benchmarks/loader_footprint.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks import loader_peers as peers
from benchmarks.loader_peers import VIEWS
from data_prep.schema import open_beton, read_samples
from trainer.data.kernel import LIB, Kernel
from trainer.data.loader import ViewLoader
from trainer.data.photometric import to_float
from trainer.data.views import View

BATCH_SIZE = 50
TINY = [View(size=1, scale=(1e-4, 1e-4))]
"""Decoding, and next to nothing else."""
Timer = Callable[[], float]
"""Makes the views of every image once; returns the CPU seconds an image."""
PIL, FFCV, DECODE = "PIL, as published", "stock FFCV, a decoder a view (crop, flip)", "decoding alone (libjpeg)"
DALI = "DALI on the CPU ({}, one view blurred)"
PEERS = {"x_pil": PIL, "x_ffcv": FFCV, "x_dali_bicubic": DALI.format("bicubic"),
         "x_dali_triangle": DALI.format("triangle"), "x_decode": DECODE}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        beton = convert(args.folder, Path(folder), copy_jpeg=args.copy_jpeg, count=args.images)
        cases = all_cases(beton, args, Path(folder))
        print(json.dumps(describe(beton)), flush=True)
        for name, kind in (("ours", "ours"), (FFCV, "ffcv")):
            print(json.dumps({"case": f"footprint, {name}", **footprint(kind, beton)}), flush=True)
        for line in report(measure(cases, args.rounds)):
            print(json.dumps(line), flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of images, one folder a class")
    parser.add_argument("--copy-jpeg", action="store_true", help="the JPEGs as they are, not capped at 500 pixels")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=8, help="times that a loader goes over the images in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dali-python", type=Path, help="an interpreter that has nvidia-dali")
    parser.add_argument("--prototype", type=Path, help="a folder with mc.c")
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose name contains one of these")
    return parser.parse_args(argv)


def convert(source: Path, folder: Path, *, copy_jpeg: bool, count: int) -> Path:
    """A beton of the first `count` images."""
    chosen = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:count]
    links = folder / "images" / "all"
    links.mkdir(parents=True)
    for path in chosen:
        (links / f"{path.parent.name}_{path.name}").symlink_to(path.resolve())
    options = ["--copy-jpeg"] if copy_jpeg else []
    command = [sys.executable, "-m", "data_prep", "convert", str(links.parent), str(folder / "bench.beton"), *options]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "bench.beton"


def describe(beton: Path) -> dict[str, float | str]:
    """What was measured on: the same loader is slower on larger JPEGs."""
    sizes = [len(data) for _, data in read_samples(beton)]
    return {"case": "data", "images": len(sizes), "kilobytes": round(statistics.mean(sizes) / 1000, 1)}


def all_cases(beton: Path, args: argparse.Namespace, folder: Path) -> dict[str, Timer]:
    images = [data for _, data in read_samples(beton)]
    sizes = [Image.open(BytesIO(data)).size for data in images]
    epochs: dict[str, Callable[[], peers.Epoch]] = {
        "ours faithful (bicubic, exact colour)": lambda: ours(beton, args.repeats),
        "ours fast (triangle, linear colour)": lambda: ours(beton, args.repeats, resize="triangle", colour="linear"),
        "ours, photometric on the device (bicubic)": lambda: ours(beton, args.repeats, photometric="device"),
        "ours faithful, normalised floats on the CPU": lambda: ours(beton, args.repeats, floats=True),
        DECODE: lambda: libjpeg(images),
        "our decoding alone": lambda: kernel_only(images, sizes, TINY),
        "kernel alone, faithful": lambda: kernel_only(images, sizes, VIEWS),
        "kernel alone, fast": lambda: kernel_only(images, sizes, VIEWS, resize="triangle", colour="linear"),
        PIL: lambda: peers.pil(images, VIEWS),
        "torchvision v2 on bytes": lambda: peers.torchvision_uint8(images, VIEWS),
        FFCV: lambda: peers.stock_ffcv(beton, VIEWS, BATCH_SIZE, np.tile(np.arange(len(images)), args.repeats)),
    }
    if args.prototype:
        make = partial(peers.prototype, args.prototype, images, sizes, VIEWS, folder)
        epochs["prototype alone, faithful"] = partial(make, fast=False)
        epochs["prototype alone, fast"] = partial(make, fast=True)
    timers = {name: timed(make()) for name, make in epochs.items() if any(part in name for part in args.only)}
    if args.dali_python:
        (folder / "jpegs").mkdir()
        for i, data in enumerate(images):
            (folder / "jpegs" / f"{i:06d}.jpg").write_bytes(data)
        for kind in ("bicubic", "triangle"):
            timers[DALI.format(kind)] = dali(args.dali_python, folder / "jpegs", kind)
    return timers


def ours(beton: Path, repeats: int, *, floats: bool = False, **options: Any) -> peers.Epoch:
    """Through FFCV's loader, as training uses it."""
    ids = np.tile(np.arange(open_beton(beton).num_samples), repeats).tolist()
    loader = ViewLoader(beton, VIEWS, batch_size=BATCH_SIZE, subset=ids, drop_last=False, **options)
    cpu = torch.device("cpu")

    def epoch() -> int:
        count = 0
        for batch in loader.epoch(0):
            count += len(batch.labels)
            if floats:
                for run in batch.views:
                    to_float(run, cpu, peers.MEAN, peers.STD)
        return count

    return epoch


def kernel_only(
    images: Sequence[bytes], sizes: Sequence[tuple[int, int]], views: Sequence[View], **options: Any
) -> peers.Epoch:
    """Without FFCV around it."""
    kernel, buffers = Kernel(views, **options), [np.frombuffer(data, np.uint8) for data in images]
    jobs = np.array([[data.ctypes.data, data.nbytes, 0, *size, i, 0]
                     for i, (data, size) in enumerate(zip(buffers, sizes, strict=True))], np.int64)  # fmt: skip
    out = np.empty(kernel.sample_bytes, np.uint8)

    def epoch() -> int:
        for job in jobs:
            LIB.views_batch(kernel.context, job.ctypes.data, 1, out.ctypes.data)
        return len(images)

    return epoch


def libjpeg(images: Sequence[bytes]) -> peers.Epoch:
    """Decoding to pixels and nothing else, by the libjpeg-turbo inside OpenCV."""
    buffers = [np.frombuffer(data, np.uint8) for data in images]

    def epoch() -> int:
        return sum(cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) is not None for data in buffers)

    return epoch


def dali(python: Path, jpegs: Path, kind: str) -> Timer:
    """Runs in another process and interpreter, a round at a time; tells its own CPU time."""
    command = [str(python), str(Path(__file__).with_name("loader_dali.py")), str(jpegs), kind, "1"]
    return lambda: float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def footprint(kind: str, beton: Path) -> dict[str, float]:
    """In a process of its own: nothing is compiled or allocated yet."""
    command = [sys.executable, "-m", "benchmarks.loader_footprint", kind, str(beton)]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return dict(json.loads(line))


def timed(epoch: peers.Epoch) -> Timer:
    def timer() -> float:
        begin = time.process_time()
        count = epoch()
        return (time.process_time() - begin) / count

    return timer


def measure(cases: dict[str, Timer], rounds: int) -> dict[str, list[float]]:
    """A value a round; a first round, in which things are compiled, is not counted."""
    values = [{name: timer() for name, timer in cases.items()} for _ in range(rounds + 1)][1:]
    return {name: [value[name] for value in values] for name in cases}


def report(seconds: dict[str, list[float]]) -> list[dict[str, float | str]]:
    lines = []
    for name, values in seconds.items():
        rates = [1 / value for value in values]
        line: dict[str, float | str] = {"case": name, "images_per_cpu_s": round(statistics.median(rates), 1)}
        line |= {"low": round(min(rates), 1), "high": round(max(rates), 1)}
        for label, other in PEERS.items():
            if other in seconds and name.startswith(("ours", "kernel", "prototype")):
                ratios = [b / a for a, b in zip(values, seconds[other], strict=True)]
                line[label] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()
