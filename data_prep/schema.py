"""The contract with the trainer: what a converted data set is, on disk and when opened.

    train.beton                 FFCV's file: field image (RGBImageField, JPEG), field label (IntField, -1 = none)
    train.beton.json            the manifest: settings, classes, counts, checksums
    train.beton.samples.tsv     one row a sample; its id is the row index in the .beton
    train.beton.left_out.tsv    images that could not be read, with the reason; only where there are any

A .beton that FFCV's own DatasetWriter made has no manifest and is welcome too. Nothing here decodes a pixel, and ffcv
is imported only once a file is opened.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.beton import RAW_MODE, BetonError, Layout, read_layout
from data_prep.names import NamesError, find_names, read_names

__all__ = [
    "SCHEMA_VERSION",
    "BetonError",
    "BetonInfo",
    "Manifest",
    "NamesError",
    "file_sha256",
    "find_names",
    "manifest_path",
    "open_beton",
    "read_labels",
    "read_manifest",
    "read_names",
    "read_samples",
    "sample_names",
]

SCHEMA_VERSION = 1
SAMPLE_COLUMNS = ("sample_id", "label", "name", "width", "height", "action", "source_format", "sha256")
LEFT_OUT_COLUMNS = ("name", "reason")
_AGAIN = "convert the images again with --overwrite"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a conversion wrote, and from what."""

    schema_version: int
    tool_version: str
    profile: str
    """speed: all images encoded again; fidelity: sound JPEGs kept byte for byte."""
    settings: dict[str, Any]
    """Everything beside the source that decides the bytes."""
    classes: list[str] | None
    """Label to name; None without labels."""
    num_samples: int
    labelled: bool
    source: str
    """Name of the source's last folder, no path."""
    sources_sha256: str
    """Over names, labels and sizes of all images found, the unreadable ones too."""
    beton_sha256: str
    beton_bytes: int
    num_reencoded: int
    num_copied: int
    num_left_out: int
    num_ignored: int
    """Files that are no images by their suffix."""
    libraries: dict[str, str]
    """Versions that decide the encoded bytes."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class BetonInfo:
    """What a .beton holds."""

    path: Path
    num_samples: int
    classes: list[str] | None
    """Label to name; None where no manifest tells."""
    labelled: bool
    """Every sample has a label of 0 or more."""
    page_size: int
    has_manifest: bool
    manifest: Manifest | None
    max_width: int
    max_height: int
    num_raw: int
    """Samples stored as pixels, not as JPEG (FFCV can; data_prep never does)."""


def open_beton(path: Path) -> BetonInfo:
    """Check that a file is a complete .beton this version can read, and say what it holds.

    raises: BetonError naming what was wanted, what came and what to do
    """
    layout = read_layout(path)
    layout.sizes()  # every image must have its place
    manifest = read_manifest(path)
    if manifest is not None:
        _check_same(layout, manifest)
    return BetonInfo(
        path=path,
        num_samples=layout.num_samples,
        classes=manifest.classes if manifest else None,
        labelled=layout.labels is not None and bool((layout.labels >= 0).all()),
        page_size=layout.page_size,
        has_manifest=manifest is not None,
        manifest=manifest,
        max_width=int(layout.image["width"].max()),
        max_height=int(layout.image["height"].max()),
        num_raw=int((layout.image["mode"] == RAW_MODE).sum()),
    )


def read_manifest(path: Path) -> Manifest | None:
    """The manifest beside a .beton; None where there is none.

    raises: BetonError where it cannot be understood or is of another schema version
    """
    source = manifest_path(path)
    try:
        known = json.loads(source.read_text(encoding="utf-8"))
        version = known["schema_version"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise BetonError(f"{source}: not a manifest of data_prep ({error!r}); {_AGAIN}") from error
    if version != SCHEMA_VERSION:
        raise BetonError(
            f"{source}: schema version {version}, this code reads {SCHEMA_VERSION}; {_AGAIN}, "
            "or use the version of data_prep that wrote it"
        )
    missing = [entry.name for entry in fields(Manifest) if entry.name not in known]
    if missing:
        raise BetonError(f"{source}: has no {', '.join(missing)}; {_AGAIN}")
    return Manifest(**{entry.name: known[entry.name] for entry in fields(Manifest)})


def read_labels(path: Path) -> npt.NDArray[np.int64]:
    """Labels in the order of the sample ids, (N,); -1 where there is none."""
    layout = read_layout(path)
    return np.full(layout.num_samples, -1, np.int64) if layout.labels is None else layout.labels


def sample_names(path: Path) -> list[str]:
    """Names relative to the source, in the order of the sample ids.

    raises: BetonError for a .beton that came without its sample list
    """
    source = samples_path(path)
    if not source.exists():
        raise BetonError(
            f"{source}: no such file, so the names of the samples are unknown (FFCV itself keeps none); "
            "convert the images with data_prep, or copy the file beside the .beton"
        )
    rows = list(read_rows(source, SAMPLE_COLUMNS))
    for expected, row in enumerate(rows):
        if row["sample_id"] != str(expected):
            raise BetonError(f"{source}: sample {expected} was wanted, found {row['sample_id']}; {_AGAIN}")
    return [row["name"] for row in rows]


def read_samples(path: Path, ids: Iterable[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """Sample ids with their stored JPEG bytes, all of them or those asked for.

    raises: BetonError for samples that FFCV stored as raw pixels
    """
    layout = read_layout(path)
    data, sizes = np.memmap(path, np.uint8, "r"), layout.sizes()
    for sample_id in range(layout.num_samples) if ids is None else ids:
        if layout.image["mode"][sample_id] == RAW_MODE:
            raise BetonError(
                f"{path}: sample {sample_id} is stored as raw pixels, JPEG was wanted; write it with "
                "write_mode='jpg', or convert the images with data_prep"
            )
        start = int(layout.image["data_ptr"][sample_id])
        yield sample_id, data[start : start + int(sizes[sample_id])].tobytes()


def manifest_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def samples_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".samples.tsv")


def left_out_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".left_out.tsv")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_text(values: Iterable[object]) -> str:
    """One line of a .tsv; tabs and line ends inside a value are written as \\t, \\n, \\r, a backslash as two."""
    return "\t".join(_escape(str(value)) for value in values) + "\n"


def read_rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of a .tsv as dictionaries. raises: BetonError where the columns are not those wanted."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        found = tuple(file.readline().rstrip("\n").split("\t"))
        if found != columns:
            raise BetonError(f"{path}: wanted the columns {' '.join(columns)}, found {' '.join(found)}; {_AGAIN}")
        for number, line in enumerate(file, 2):
            values = [_unescape(value) for value in line.rstrip("\n").split("\t")]
            if len(values) != len(columns):
                raise BetonError(f"{path}: line {number} has {len(values)} of {len(columns)} columns; {_AGAIN}")
            yield dict(zip(columns, values, strict=True))


def _check_same(layout: Layout, manifest: Manifest) -> None:
    size = layout.path.stat().st_size
    if (layout.num_samples, size) != (manifest.num_samples, manifest.beton_bytes):
        raise BetonError(
            f"{layout.path}: has {layout.num_samples} samples in {size} bytes, its manifest speaks of "
            f"{manifest.num_samples} in {manifest.beton_bytes}: they do not belong together; "
            f"{_AGAIN}, or copy both from where they were made"
        )


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _unescape(value: str) -> str:
    if "\\" not in value:
        return value
    parts = value.split("\\\\")
    return "\\".join(part.replace("\\t", "\t").replace("\\n", "\n").replace("\\r", "\r") for part in parts)
