"""Images inside tar archives, read in place: archives of class folders, ImageNet's archive of archives, WebDataset."""

import bz2
import gzip
import lzma
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data_prep.folders import Found, is_image, label_by_folder
from data_prep.listing import UNLABELLED, Item, Listing, SourceError, numbered_classes
from data_prep.names import some

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
COMPANIONS = (".cls", ".json", ".txt")
"""Files with which WebDataset describes the image of the same key."""
_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7": lzma.open,
    b"BZ": bz2.open,
}


@dataclass(frozen=True)
class ArchiveReader:
    """Reads members of uncompressed archives by their place; `where` is (archive, offset)."""

    archives: tuple[Path, ...]

    def read(self, item: Item) -> bytes:
        number, offset = item.where
        return _read_at(self.archives[number], offset, item.num_bytes)


def list_archives(
    archives: Sequence[Path],
    *,
    name: str,
    scratch: Path | None = None,
    split: str | None = None,
    unlabelled: bool = False,
) -> Listing:
    """List one archive of class folders or of images, or several shards.

    An archive inside an archive counts as a folder (ImageNet's training set comes so). Shards with a .cls file beside
    each image take their labels from it, shards with other companions have none; of several archives with images only,
    each is a class.
    raises: SourceError where nothing can be read
    """
    plain = tuple(_plain(path, scratch) for path in archives)
    reader = ArchiveReader(plain)
    found = [
        replace(entry, path=f"{_stem(archives[number])}/{entry.path}" if len(plain) > 1 else entry.path)
        for number, path in enumerate(plain)
        for entry in _members(path, number)
    ]
    if any(entry.path.endswith(COMPANIONS) for entry in found) and (shards := _shards(name, found, reader)):
        return shards
    if len(plain) == 1:
        found = _strip(found, split, name)
    elif split is not None:
        raise SourceError(f"{name}: --split chooses a folder inside one archive, there are {len(plain)}")
    first_level = {entry.path.split("/")[0] for entry in found if "/" in entry.path}
    return label_by_folder(found, first_level, root=name, name=name, reader=reader, unlabelled=unlabelled)


def _members(path: Path, number: int) -> Iterator[Found]:
    try:
        with path.open("rb") as file:
            yield from _scan(file, "", 0, number)
    except tarfile.TarError as error:
        raise SourceError(f"{path.name}: not a sound tar archive ({error}); fetch it again") from error


def _scan(file: BinaryIO, prefix: str, start: int, number: int) -> Iterator[Found]:
    """Files of an archive and of the archives in it, with their offsets in the outermost file."""
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # a million of them would stay in memory
            path = prefix + "/".join(part for part in member.name.split("/") if part not in ("", "."))
            if not member.isreg() or member.issparse() or PurePosixPath(path).name.startswith("."):
                continue
            offset = start + member.offset_data
            if path.endswith(".tar"):
                inner = archive.extractfile(member)
                assert inner is not None
                yield from _scan(inner, path.removesuffix(".tar") + "/", offset, number)  # type: ignore[arg-type]
            else:
                yield Found(path, member.size, (number, offset))


def _strip(found: Sequence[Found], split: str | None, name: str) -> list[Found]:
    """Go down to the split, and past folders that hold everything, as long as there are folders below."""
    depth = 0
    parts = [entry.path.split("/") for entry in found]
    if split is not None:
        depths = [path[:-1].index(split) + 1 for path in parts if split in path[:-1]]
        if not depths:
            there = sorted({folder for path in parts for folder in path[:-1][:2]})
            raise SourceError(f"{name}: has no folder {split} for --split {split}; its folders: {some(there)}")
        depth = min(depths)
        pairs = [(entry, path) for entry, path in zip(found, parts, strict=True) if split in path[depth - 1 : depth]]
        return [replace(entry, path="/".join(path[depth:])) for entry, path in pairs if len(path) > depth]
    images = [path for path in parts if is_image(path[-1])]
    while images and all(len(path) > depth + 2 and path[depth] == images[0][depth] for path in images):
        depth += 1
    return [
        replace(entry, path="/".join(path[depth:]))
        for entry, path in zip(found, parts, strict=True)
        if len(path) > depth
    ]


def _shards(name: str, found: Sequence[Found], reader: ArchiveReader) -> Listing | None:
    """WebDataset: files of one key belong together. None where the companions belong to no image."""
    companions = {entry.path: entry for entry in found if not is_image(entry.path)}
    images = [entry for entry in found if is_image(entry.path)]
    keys = [_key(entry.path) for entry in images]
    if not any(key + suffix in companions for key in keys[:1000] for suffix in COMPANIONS):
        return None
    classes = [companions.get(key + ".cls") for key in keys]
    without = [entry.path for entry, label in zip(images, classes, strict=True) if label is None]
    if 0 < len(without) < len(images):
        raise SourceError(
            f"{name}: {len(without)} of {len(images)} images have no .cls file beside them "
            f"({some(without)}); give every image a label, or none"
        )
    labels = [UNLABELLED if label is None else _class_number(reader, label) for label in classes]
    names = None if without else numbered_classes(labels, name)
    items = [Item(entry.path, label, entry.num_bytes, entry.where) for entry, label in zip(images, labels, strict=True)]
    others = len(found) - len(images) - sum(label is not None for label in classes)
    return Listing(name, items, reader, names, others)


def _class_number(reader: ArchiveReader, found: Found) -> int:
    text = _read_at(reader.archives[found.where[0]], found.where[1], found.num_bytes).decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise SourceError(f"{found.path}: a class number was wanted, found {text[:40]!r}; write the labels as numbers")
    return int(text)


def _key(path: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    folder, _, file = path.rpartition("/")
    return (folder + "/" if folder else "") + file.split(".")[0]


def _stem(path: Path) -> str:
    suffix = next(suffix for suffix in ARCHIVE_SUFFIXES if path.name.lower().endswith(suffix))
    return path.name[: -len(suffix)]


def _plain(path: Path, scratch: Path | None) -> Path:
    """The archive without compression, so that members can be read in any order."""
    with path.open("rb") as file:
        opener = _OPENERS.get(file.read(2))
    if opener is None:
        return path
    if scratch is None:
        raise SourceError(f"{path}: is compressed, so it needs a folder to unpack it to; unpack it first")
    scratch.mkdir(parents=True, exist_ok=True)
    unpacked = scratch / f"{_stem(path)}.tar"
    try:
        with opener(path, "rb") as packed, unpacked.open("wb") as target:
            shutil.copyfileobj(packed, target, 1 << 20)
    except (EOFError, lzma.LZMAError) as error:
        raise SourceError(f"{path}: its compressed data are damaged ({error}); fetch it again") from error
    return unpacked


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
