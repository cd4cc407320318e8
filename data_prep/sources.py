"""Where images come from: what is there, in a fixed order, with which label. No pixel is read here."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".mpo"})
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled"})
UNLABELLED = -1


class SourceError(ValueError):
    """The source is not what was wanted; says what was wanted, what came and what to do."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image that is there, not yet read."""

    name: str
    """Unique in its listing, with / between folders."""
    label: int
    num_bytes: int
    where: tuple[int, ...] = ()
    """What the listing's reader needs beside the name."""


class Reader(Protocol):
    """Fetches an item's encoded bytes; sent to the worker processes, so it must pickle."""

    def read(self, item: Item) -> bytes: ...


@dataclass(frozen=True)
class Listing:
    """All images of a source, in the order of their sample ids."""

    name: str
    """What to call the source in messages and in the manifest: no path of this machine."""
    items: Sequence[Item]
    reader: Reader
    classes: tuple[str, ...] | None
    """Label to class name; None where the source has no labels."""
    num_ignored: int = 0
    """Files that no image suffix marks as an image."""
    notes: tuple[str, ...] = field(default=())
    """What a user should hear about the source."""

    def sha256(self) -> str:
        """Identity of the listing: names, labels and sizes, not contents."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for item in self.items:
            digest.update(f"{item.name}\0{item.label}\0{item.num_bytes}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class FolderReader:
    """Reads files below one folder."""

    root: Path

    def read(self, item: Item) -> bytes:
        return (self.root / item.name).read_bytes()


def list_source(source: Path, *, split: str | None = None, unlabelled: bool = False) -> Listing:
    """List a source of any kind.

    raises: SourceError where it is missing, empty or ambiguous
    """
    if not source.exists():
        raise SourceError(f"{source}: no such folder; give the folder that holds the class folders or the images")
    if not source.is_dir():
        raise SourceError(f"{source}: a folder was wanted, this is a file")
    return list_folder(_split_folder(source, split), name=source.resolve().name, unlabelled=unlabelled)


def list_folder(root: Path, *, name: str, unlabelled: bool = False) -> Listing:
    """List a folder of class folders, or of images without labels.

    Images only below first-level folders: each such folder is a class, whatever lies deeper in it. Images directly in
    `root`, and none below: no labels. Both at once is refused unless `unlabelled` says to take all without labels.
    """
    found = sorted(_walk(root), key=lambda entry: entry[0].split("/"))
    images = [(path, size) for path, size in found if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]
    ignored = Counter(PurePosixPath(path).suffix.lower() or "no suffix" for path, _ in found)
    num_ignored = len(found) - len(images)
    if not images:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in ignored.most_common(5)) or "no files at all"
        raise SourceError(f"{root}: no images found ({kinds}); image files end in {' '.join(sorted(IMAGE_SUFFIXES))}")
    direct = [path for path, _ in images if "/" not in path]
    if direct and len(direct) < len(images) and not unlabelled:
        raise SourceError(f"{root}: holds both images ({direct[0]} and {len(direct) - 1} more) and folders with images "
                          f"({_first_folder(images)}), so it is not clear whether the folders are classes; move the "
                          "images away, or give --unlabelled to take them all without labels")
    if unlabelled or direct:
        items = [Item(path, UNLABELLED, size) for path, size in images]
        return Listing(name, items, FolderReader(root), None, num_ignored)
    classes = tuple(sorted(_folders(root)))
    _refuse_splits(root, classes)
    number = {folder: label for label, folder in enumerate(classes)}
    items = [Item(path, number[path.split("/", 1)[0]], size) for path, size in images]
    empty = sorted(set(classes) - {classes[item.label] for item in items})
    notes = (f"{len(empty)} class folders hold no image but keep their label: {_some(empty)}",) if empty else ()
    return Listing(name, items, FolderReader(root), classes, num_ignored, notes)


def take_subset(listing: Listing, names: Sequence[str], *, list_name: str) -> Listing:
    """Keep the named items only, in the listing's order; classes keep their labels.

    names: as in the listing, or bare file names as in the SimCLR lists
    raises: SourceError for names that are unknown, or that fit several files
    """
    by_name = {item.name: item for item in listing.items}
    by_file: dict[str, list[Item]] = {}
    for item in listing.items:
        by_file.setdefault(PurePosixPath(item.name).name, []).append(item)
    chosen: set[str] = set()
    unknown: list[str] = []
    for name in names:
        matches = [by_name[name]] if name in by_name else by_file.get(name, [])
        if len(matches) > 1:
            raise SourceError(f"{list_name}: {name} fits {len(matches)} images of {listing.name} ({matches[0].name}, "
                              f"{matches[1].name} ...); write their paths below the source instead")
        chosen.update(item.name for item in matches)
        unknown += [] if matches else [name]
    if unknown:
        raise SourceError(f"{list_name}: {len(unknown)} of {len(names)} names are not in {listing.name} "
                          f"({_some(unknown)}); take them out of the list, or give the source that has them")
    if not chosen:
        raise SourceError(f"{list_name}: names no image; write one name a line")
    return replace(listing, items=[item for item in listing.items if item.name in chosen])


def read_names(path: Path) -> list[str]:
    """Names of a text file, one a line; empty lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: a text file with one image name a line was wanted ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _split_folder(source: Path, split: str | None) -> Path:
    if split is None:
        return source
    if not (source / split).is_dir():
        there = _some(sorted(_folders(source)))
        raise SourceError(f"{source}: has no folder {split} for --split {split}; its folders: {there}")
    return source / split


def _refuse_splits(root: Path, classes: Sequence[str]) -> None:
    """Train and val taken for two classes would be a wrong data set that looks right."""
    if all(folder.lower() in SPLIT_NAMES for folder in classes):
        raise SourceError(f"{root}: its folders ({_some(classes)}) look like splits, not classes; choose one with "
                          f"--split {classes[0]}, or take everything without labels with --unlabelled")


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Files below a folder with their sizes, following links once; hidden files and folders are left out."""
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            info = os.stat(root / prefix)  # noqa: PTH116  (Path.stat is the same; os.scandir below has no Path twin)
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            with os.scandir(root / prefix) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise SourceError(f"{root / prefix}: cannot be listed ({error.strerror})") from error
        for entry in visible:
            path = prefix + entry.name
            if entry.is_dir():
                waiting.append(path + "/")
            else:
                yield path, _size(entry)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere: reading it will fail, and be reported, as a bad image
        return 0


def _folders(root: Path) -> Iterator[str]:
    return (entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _first_folder(images: Sequence[tuple[str, int]]) -> str:
    return next(path.split("/", 1)[0] for path, _ in images if "/" in path)


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
