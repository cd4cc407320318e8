"""Folders of images: a folder a class, or no labels at all."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.listing import IMAGE_SUFFIXES, UNLABELLED, Item, Listing, Reader, SourceError
from data_prep.names import some

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled"})


@dataclass(frozen=True)
class FolderReader:
    """Reads files below one folder."""

    root: Path

    def read(self, item: Item) -> bytes:
        return (self.root / item.name).read_bytes()


@dataclass(frozen=True, slots=True)
class Found:
    """A file of any kind, on disk or inside an archive."""

    path: str
    """Below the source, with / between folders."""
    num_bytes: int
    where: tuple[int, ...] = ()


def list_folder(root: Path, *, name: str, unlabelled: bool = False) -> Listing:
    """List a folder of class folders, or of images without labels. raises: SourceError."""
    return label_by_folder(
        list(_walk(root)), folders(root), root=str(root), name=name, reader=FolderReader(root), unlabelled=unlabelled
    )


def label_by_folder(
    found: Sequence[Found], first_level: Iterable[str], *, root: str, name: str, reader: Reader, unlabelled: bool
) -> Listing:
    """Sort files and give them the labels that their folders say.

    Images only below first-level folders: each such folder is a class, whatever lies deeper in it. Images directly in
    the root, and none below: no labels. Both at once is refused unless `unlabelled` says to take all without labels.
    """
    found = sorted(found, key=lambda entry: entry.path.split("/"))
    images = [entry for entry in found if is_image(entry.path)]
    num_ignored = len(found) - len(images)
    _refuse_none(images, found, root)
    direct = [entry.path for entry in images if "/" not in entry.path]
    if direct and len(direct) < len(images) and not unlabelled:
        below = next(entry.path.split("/")[0] for entry in images if "/" in entry.path)
        raise SourceError(
            f"{root}: holds both images ({direct[0]} and {len(direct) - 1} more) and folders with images "
            f"({below}), so it is not clear whether the folders are classes; move the images away, or "
            "give --unlabelled to take them all without labels"
        )
    if unlabelled or direct:
        items = [Item(entry.path, UNLABELLED, entry.num_bytes, entry.where) for entry in images]
        return Listing(name, items, reader, None, num_ignored)
    classes = tuple(sorted(set(first_level)))
    _refuse_splits(root, classes)
    number = {folder: label for label, folder in enumerate(classes)}
    items = [Item(entry.path, number[entry.path.split("/", 1)[0]], entry.num_bytes, entry.where) for entry in images]
    empty = sorted(set(classes) - {classes[item.label] for item in items})
    notes = (f"{len(empty)} class folders hold no image but keep their label: {some(empty)}",) if empty else ()
    return Listing(name, items, reader, classes, num_ignored, notes)


def is_image(path: str) -> bool:
    """Whether the suffix says so."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def folders(root: Path) -> list[str]:
    """Names of the folders directly in a folder, hidden ones left out."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def split_folder(source: Path, split: str | None) -> Path:
    """The folder of a split. raises: SourceError that names the folders there are."""
    if split is None:
        return source
    if not (source / split).is_dir():
        raise SourceError(f"{source}: has no folder {split} for --split {split}; its folders: {some(folders(source))}")
    return source / split


def _refuse_none(images: Sequence[Found], found: Sequence[Found], root: str) -> None:
    if not images:
        suffixes = Counter(PurePosixPath(entry.path).suffix.lower() or "no suffix" for entry in found)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5)) or "no files at all"
        raise SourceError(f"{root}: no images found ({kinds}); image files end in {' '.join(sorted(IMAGE_SUFFIXES))}")


def _refuse_splits(root: str, classes: Sequence[str]) -> None:
    """Train and val taken for two classes would be a wrong data set that looks right."""
    if all(folder.lower() in SPLIT_NAMES for folder in classes):
        raise SourceError(
            f"{root}: its folders ({some(classes)}) look like splits, not classes; choose one with "
            f"--split {classes[0]}, or take everything without labels with --unlabelled"
        )


def _walk(root: Path) -> Iterator[Found]:
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
                yield Found(path, _size(entry))


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere: reading it will fail, and be reported, as a bad image
        return 0
