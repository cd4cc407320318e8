"""Is a .beton whole, does it agree with its manifest, does every image decode? And a table of what is in it."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.beton import JPEG_MODE, RAW_MODE, BetonError, Layout, read_layout
from data_prep.images import BadImageError, decode_with_pillow
from data_prep.pool import ordered_map, split_evenly
from data_prep.progress import Meter
from data_prep.schema import (
    SAMPLE_COLUMNS,
    BetonInfo,
    file_sha256,
    open_beton,
    read_rows,
    samples_path,
)

CHUNK_SIZE = 64
SPOT_CHECKS = 64
"""Images decoded at the end of every conversion."""


@dataclass(frozen=True)
class Report:
    """What a verification looked at."""

    info: BetonInfo
    num_decoded: int


def verify(path: Path, *, every: int = 1, workers: int = 1) -> Report:
    """Check structure, manifest, checksums and every `every`-th image.

    raises: BetonError that names the faults
    """
    if every < 1:
        raise ValueError(f"--every must be 1 or more, got {every}")
    info, layout = open_beton(path), read_layout(path)
    labels, digests = _listed(info)
    faults = list(_manifest_faults(info, layout, labels)) if info.manifest else []
    samples = _samples(layout, digests if len(digests) == info.num_samples else None)[::every]
    results = ordered_map(
        check_chunk,
        split_evenly(samples, CHUNK_SIZE),
        workers=workers,
        preload=__name__,
        start=start_worker,
        start_args=(path,),
    )
    with closing(results), Meter("verify", len(samples)) as meter:
        for chunk, found in zip(split_evenly(samples, CHUNK_SIZE), results, strict=True):
            faults += found
            meter.advance(len(chunk))
    _refuse(path, faults)
    return Report(info, len(samples))


def spot_check(path: Path) -> None:
    """Check the structure, and decode a few images evenly spread. raises: BetonError."""
    samples = _samples(read_layout(path), None)
    start_worker(path)
    _refuse(path, check_chunk(samples[:: max(1, len(samples) // SPOT_CHECKS)]))


class Sample(NamedTuple):
    """What there is to check of a sample, sent to the workers so that they need not import ffcv."""

    sample_id: int
    mode: int
    width: int
    height: int
    start: int
    num_bytes: int
    sha256: str | None


def _samples(layout: Layout, digests: Sequence[str] | None) -> list[Sample]:
    columns = [layout.image[name].tolist() for name in ("mode", "width", "height", "data_ptr")]
    known = [None] * layout.num_samples if digests is None else digests
    rows = zip(range(layout.num_samples), *columns, layout.sizes().tolist(), known, strict=True)
    return [Sample(*row) for row in rows]


_data: npt.NDArray[np.uint8] | None = None


def start_worker(path: Path) -> None:
    """Prepare a process for check_chunk."""
    global _data
    _data = np.memmap(path, np.uint8, "r")


def check_chunk(samples: Sequence[Sample]) -> list[str]:
    """Faults of these samples, one line each."""
    return [f"sample {sample.sample_id}: {fault}" for sample in samples for fault in _sample_faults(sample)]


def _sample_faults(sample: Sample) -> Iterator[str]:
    assert _data is not None
    data = _data[sample.start : sample.start + sample.num_bytes].tobytes()
    if sample.sha256 is not None and hashlib.sha256(data).hexdigest() != sample.sha256:
        yield "its bytes are not those that were written (sha256)"
    elif sample.mode == JPEG_MODE:
        yield from _jpeg_faults(data, sample.width, sample.height)
    elif sample.mode != RAW_MODE:
        yield f"unknown image mode {sample.mode}"
    elif len(data) != sample.width * sample.height * 3:
        yield f"{sample.width} x {sample.height} raw pixels need another number of bytes than its {len(data)}"


def _jpeg_faults(data: bytes, width: int, height: int) -> Iterator[str]:
    try:
        pixels = decode_with_pillow(data)
    except BadImageError as error:
        yield f"does not decode ({error})"
        return
    if pixels.shape[:2] != (height, width):
        yield f"is {pixels.shape[1]} x {pixels.shape[0]}, the table says {width} x {height}"


def _listed(info: BetonInfo) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Labels and sha256 of the samples that the list beside the .beton names; nothing where there is no manifest."""
    rows = read_rows(samples_path(info.path), SAMPLE_COLUMNS) if info.manifest else ()
    pairs = [(int(row["label"]), row["sha256"]) for row in rows]
    return np.array([label for label, _ in pairs], np.int64), [digest for _, digest in pairs]


def _manifest_faults(info: BetonInfo, layout: Layout, labels: npt.NDArray[np.int64]) -> Iterator[str]:
    assert info.manifest is not None
    if file_sha256(info.path) != info.manifest.beton_sha256:
        yield "the file's sha256 is not that of its manifest"
    listed = samples_path(info.path).name
    if len(labels) != info.num_samples:
        yield f"{listed} lists {len(labels)} samples, the file has {info.num_samples}"
        return
    wrong = np.flatnonzero(labels != layout.labels)
    if wrong.size:
        yield f"{wrong.size} samples (first: {wrong[0]}) have another label than {listed} says"
    if info.classes is not None and labels.max() >= len(info.classes):
        yield f"label {labels.max()} has no class: the manifest names {len(info.classes)}"


def _refuse(path: Path, faults: Sequence[str]) -> None:
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise BetonError(
            f"{path}: {len(faults)} faults: {'; '.join(faults[:5])}{more}; copy the file again from where "
            "it was made, or convert the images again with --overwrite"
        )


def describe(path: Path) -> list[tuple[str, str]]:
    """What is in a .beton, as names and values for a table. raises: BetonError."""
    info, layout = open_beton(path), read_layout(path)
    sizes = layout.sizes()
    pixels = layout.image["width"].astype(np.int64) * layout.image["height"]
    largest = int(pixels.argmax())
    width, height = (int(layout.image[side][largest]) for side in ("width", "height"))
    return [
        ("samples", str(info.num_samples)),
        *_describe_labels(info, layout),
        ("file", f"{path.stat().st_size / 1e6:.1f} MB, pages of {info.page_size >> 20} MiB"),
        ("mean image", f"{sizes.mean() / 1e3:.1f} kB, {pixels.mean() / 1e6:.3f} megapixels"),
        ("largest image", f"{width} x {height} (sample {largest})"),
        ("stored as", f"{info.num_samples - info.num_raw} JPEG, {info.num_raw} raw pixels"),
        *_describe_manifest(info),
    ]


def _describe_labels(info: BetonInfo, layout: Layout) -> list[tuple[str, str]]:
    if layout.labels is None or not info.labelled:
        return [("labels", "none")]
    counts = np.bincount(layout.labels, minlength=len(info.classes or ()))
    names = f": {', '.join(info.classes[:4])}{' ...' if len(info.classes) > 4 else ''}" if info.classes else ""
    return [("classes", f"{len(counts)}{names}"), ("samples a class", f"{counts.min()} to {counts.max()}")]


def _describe_manifest(info: BetonInfo) -> list[tuple[str, str]]:
    manifest = info.manifest
    if manifest is None:
        return [("manifest", "none (not made by data_prep)")]
    settings = ", ".join(f"{key} {value}" for key, value in manifest.settings.items() if value is not None)
    return [
        ("source", manifest.source),
        ("profile", f"{manifest.profile} ({settings})"),
        (
            "images",
            f"{manifest.num_reencoded} encoded again, {manifest.num_copied} copied, "
            f"{manifest.num_left_out} left out, {manifest.num_ignored} other files",
        ),
        ("sha256", manifest.beton_sha256),
    ]
