"""From a source of images to a .beton with its manifest: all of it, or nothing."""

import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import cv2
import PIL
import PIL.features

from data_prep.beton import BetonWriter
from data_prep.images import BadImageError, Encoding, Stored, store, tap_warnings
from data_prep.pool import ordered_map, split_evenly
from data_prep.progress import Meter
from data_prep.schema import (
    LEFT_OUT_COLUMNS,
    SAMPLE_COLUMNS,
    SCHEMA_VERSION,
    BetonError,
    Manifest,
    file_sha256,
    left_out_path,
    manifest_path,
    read_labels,
    read_manifest,
    row_text,
    samples_path,
)
from data_prep.sources import Item, Listing, Reader
from data_prep.verify import spot_check

CHUNK_SIZE = 16
"""Images a task: some 50 ms of work, long against the cost of sending it."""


class ConvertError(ValueError):
    """A conversion cannot be done; says what was wanted, what came and what to do."""


@dataclass(frozen=True)
class Tally:
    """What became of the images of a listing."""

    copied: int
    left_out: tuple[tuple[str, str], ...]
    """Name and reason."""
    damaged: int
    """Stored, though the decoder warned of damaged data."""


def convert(
    listing: Listing,
    out: Path,
    *,
    encoding: Encoding,
    on_bad: Literal["skip", "fail"] = "skip",
    options: dict[str, Any] | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> tuple[Manifest, Tally] | None:
    """Write a listing as .beton, manifest and sample list; nothing appears under these names before all is right.

    options: what else belongs to the settings that the manifest records
    returns: None where `out` is there already, made with the same settings from the same images
    raises: ConvertError, WorkerDiedError, BetonError, OSError; no file is left behind
    """
    settings = {
        **(options or {}),
        "on_bad": on_bad,
        "quality": encoding.quality,
        "max_size": encoding.max_size,
        "copy_jpeg": encoding.copy_jpeg,
        "chroma": "4:2:0",
        "page_size": encoding.max_bytes,
    }
    if out.exists() and not overwrite:
        _refuse_other(listing, out, settings)
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    with _drafts(out) as draft:
        with draft(samples_path(out)).open("x", encoding="utf-8", errors="surrogateescape", newline="\n") as samples:
            tally = _write(listing, draft(out), samples, encoding, on_bad, workers)
        _write_left_out(draft(left_out_path(out)), tally)
        spot_check(draft(out))
        manifest = _manifest(listing, draft(out), tally, settings)
        _write_text(draft(manifest_path(out)), manifest.to_json())
        _publish(out, draft)
    return manifest, tally


def _refuse_other(listing: Listing, out: Path, settings: dict[str, Any]) -> None:
    """Return if `out` is what would be written; raise otherwise."""
    manifest = read_manifest(out)
    if manifest is None:
        raise ConvertError(
            f"{out}: exists, and no manifest says from what it was made; choose another name, or give --overwrite"
        )
    changed = [
        f"{key} {manifest.settings.get(key)!r} then, {settings.get(key)!r} now"
        for key in sorted(settings.keys() | manifest.settings.keys())
        if settings.get(key) != manifest.settings.get(key)
    ]
    if manifest.sources_sha256 != listing.sha256():
        changed.append("other images")
    if changed:
        raise ConvertError(
            f"{out}: exists, made differently ({'; '.join(changed)}); choose another name, or give --overwrite"
        )
    if out.stat().st_size != manifest.beton_bytes or file_sha256(out) != manifest.beton_sha256:
        raise BetonError(
            f"{out}: exists, but is not what its manifest describes (other size or sha256): damaged; "
            "give --overwrite to convert again"
        )


def _write(
    listing: Listing, path: Path, samples: TextIO, encoding: Encoding, on_bad: Literal["skip", "fail"], workers: int
) -> Tally:
    copied = damaged = 0
    left_out = []
    samples.write("\t".join(SAMPLE_COLUMNS) + "\n")
    with BetonWriter(path, capacity=len(listing.items), page_size=encoding.max_bytes) as writer:
        for item, stored, digest in _stored(listing, encoding, workers):
            if isinstance(stored, str):
                _refuse_bad(item, stored, on_bad)
                left_out.append((item.name, stored))
                continue
            sample_id = writer.add(stored.data, width=stored.width, height=stored.height, label=item.label)
            action = "copied" if stored.is_copy else "re-encoded"
            samples.write(
                row_text(
                    (
                        sample_id,
                        item.label,
                        item.name,
                        stored.width,
                        stored.height,
                        action,
                        stored.source_format,
                        digest,
                    )
                )
            )
            copied += stored.is_copy
            damaged += stored.source_format.endswith("/damaged")
        if writer.num_samples == 0:
            raise ConvertError(
                f"{listing.name}: none of its {len(left_out)} images can be read; the first, "
                f"{left_out[0][0]}: {left_out[0][1]}"
            )
        writer.finish()
    return Tally(copied, tuple(left_out), damaged)


def _refuse_bad(item: Item, reason: str, on_bad: Literal["skip", "fail"]) -> None:
    if on_bad == "fail":
        raise ConvertError(f"{item.name}: {reason}; repair or remove it, or give --on-bad skip to leave such out")


def _stored(listing: Listing, encoding: Encoding, workers: int) -> Iterator[tuple[Item, Stored | str, str]]:
    """Every item with what to store of it (or the reason why it cannot be) and the sha256 of that."""
    tasks = split_evenly(listing.items, CHUNK_SIZE)
    results = ordered_map(
        store_chunk, tasks, workers=workers, preload=__name__, start=start_worker, start_args=(listing.reader, encoding)
    )
    with closing(results), Meter("convert", len(listing.items)) as meter:
        for items, stored in zip(split_evenly(listing.items, CHUNK_SIZE), results, strict=True):
            for item, (result, digest) in zip(items, stored, strict=True):
                yield item, result, digest
            meter.advance(len(items))


_job: tuple[Reader, Encoding] | None = None


def start_worker(reader: Reader, encoding: Encoding) -> None:
    """Prepare a worker process: what to read from, how to encode."""
    global _job
    cv2.setNumThreads(1)  # one process a core already
    _job = reader, encoding
    tap_warnings()


def store_chunk(items: Sequence[Item]) -> list[tuple[Stored | str, str]]:
    """In a worker process: every item's stored form with its sha256, or the reason why there is none."""
    assert _job is not None
    return [_store_item(item, *_job) for item in items]


def _store_item(item: Item, reader: Reader, encoding: Encoding) -> tuple[Stored | str, str]:
    try:
        stored = store(reader.read(item), encoding)
    except BadImageError as error:
        return str(error), ""
    except OSError as error:
        return f"cannot be read ({error.strerror or error})", ""
    return stored, hashlib.sha256(stored.data).hexdigest()


def _manifest(listing: Listing, path: Path, tally: Tally, settings: dict[str, Any]) -> Manifest:
    labels = read_labels(path)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        tool_version=_version(),
        profile="fidelity" if settings["copy_jpeg"] else "speed",
        settings=settings,
        classes=None if listing.classes is None else list(listing.classes),
        num_samples=len(labels),
        labelled=bool((labels >= 0).all()),
        source=listing.name,
        sources_sha256=listing.sha256(),
        beton_sha256=file_sha256(path),
        beton_bytes=path.stat().st_size,
        num_reencoded=len(labels) - tally.copied,
        num_copied=tally.copied,
        num_left_out=len(tally.left_out),
        num_ignored=listing.num_ignored,
        libraries={
            "opencv": cv2.__version__,
            "pillow": PIL.__version__,
            "pillow_libjpeg_turbo": PIL.features.version("libjpeg_turbo") or "unknown",
        },
    )


def _version() -> str:
    try:
        return importlib.metadata.version("featherweight")
    except importlib.metadata.PackageNotFoundError:
        return "source checkout"


def _write_left_out(path: Path, tally: Tally) -> None:
    if tally.left_out:
        _write_text(path, row_text(LEFT_OUT_COLUMNS) + "".join(row_text(row) for row in tally.left_out))


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.write(text)


class _Draft:
    """Temporary names beside the final ones."""

    def __init__(self) -> None:
        self.suffix = f".tmp-{os.getpid()}"

    def __call__(self, final: Path) -> Path:
        return final.with_name(final.name + self.suffix)


@contextmanager
def _drafts(out: Path) -> Iterator[_Draft]:
    """Files under temporary names; whatever still has one at the end, however that comes, is removed."""
    draft = _Draft()
    finals = (out, *_companions(out))
    for final in finals:
        draft(final).unlink(missing_ok=True)  # in a container the killed run before may have had our process id
    for left in out.parent.glob(out.name + ".tmp-*"):
        print(f"{left}: left by a conversion that was killed, or one is running; delete it if none is", file=sys.stderr)
    try:
        yield draft
    finally:
        for final in finals:
            draft(final).unlink(missing_ok=True)


def _companions(out: Path) -> tuple[Path, ...]:
    return samples_path(out), left_out_path(out), manifest_path(out)


def _publish(out: Path, draft: _Draft) -> None:
    """Give the files their names, the .beton last: where it is new, so is everything beside it."""
    for final in (*_companions(out), out):
        if not draft(final).exists():
            final.unlink(missing_ok=True)
            continue
        with draft(final).open("rb") as file:
            os.fsync(file.fileno())
        draft(final).replace(final)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
