"""Where images come from: finds out what kind of source a path is, and lists it."""

from collections.abc import Sequence
from pathlib import Path

from data_prep.archives import ARCHIVE_SUFFIXES, list_archives
from data_prep.binaries import list_binary, recognise
from data_prep.clevr import list_clevr
from data_prep.folders import FolderReader, folders, is_image, list_folder, split_folder
from data_prep.listing import (
    UNLABELLED,
    Item,
    Listing,
    Reader,
    SourceError,
    numbered_classes,
    take_subset,
)
from data_prep.names import read_names, some
from data_prep.tables import list_tables

__all__ = ["Item", "Listing", "Reader", "SourceError", "list_source", "take_subset"]

LIST_SUFFIXES = (".txt", ".tsv", ".lst", ".list")


def list_source(
    source: Path,
    *,
    scratch: Path | None = None,
    split: str | None = None,
    unlabelled: bool = False,
    labels: str | None = None,
) -> Listing:
    """List a source of any kind.

    That is a folder of class folders or of images, tar archives or WebDataset shards, parquet files of the Hugging Face
    hub, the binary files of CIFAR-10, CIFAR-100 and STL-10, or a text file that names images.
    scratch: folder to make for the contents of compressed archives, needed until the images are read; None refuses such
    labels: clevr_count or clevr_dist, for a folder of CLEVR; otherwise the kind of source says what the labels are
    raises: SourceError where it is missing, empty or ambiguous
    """
    if not source.exists():
        raise SourceError(f"{source}: no such folder or file; give the folder that holds the images or their classes")
    name = source.resolve().name
    if labels is not None:
        return list_clevr(source, labels, name=name, split=split)
    listing = _list(source, name, scratch, split, unlabelled)
    if not unlabelled or listing.classes is None:
        return listing
    return Listing(
        listing.name,
        [Item(item.name, UNLABELLED, item.num_bytes, item.where) for item in listing.items],
        listing.reader,
        None,
        listing.num_ignored,
        listing.notes,
    )


def _list(source: Path, name: str, scratch: Path | None, split: str | None, unlabelled: bool) -> Listing:
    if source.is_dir():
        return _list_folder(source, name, scratch, split, unlabelled)
    if source.name.lower().endswith(ARCHIVE_SUFFIXES):
        return list_archives([source], name=name, split=split, unlabelled=unlabelled, scratch=scratch)
    if split is not None:
        raise SourceError(
            f"{source}: --split {split} chooses a part of a folder or of an archive, this is one file; leave it out"
        )
    if source.suffix.lower() == ".parquet":
        return list_tables([source], name=name)
    if source.suffix.lower() in LIST_SUFFIXES:
        return list_file(source, name=name)
    raise SourceError(
        f"{source}: not a known kind of source; wanted a folder, or a file that ends in "
        f"{' '.join((*ARCHIVE_SUFFIXES, '.parquet', *LIST_SUFFIXES))}"
    )


def _list_folder(source: Path, name: str, scratch: Path | None, split: str | None, unlabelled: bool) -> Listing:
    if (kind := recognise(source)) is not None:
        return list_binary(source, kind, name=name, split=split)
    if tables := _tables(source, split):
        return list_tables(tables, name=name)
    root = split_folder(source, split)
    if not folders(root) and not any(is_image(entry.name) for entry in root.iterdir()):
        archives = sorted(entry for entry in root.iterdir() if entry.name.lower().endswith(ARCHIVE_SUFFIXES))
        if archives:
            return list_archives(archives, name=name, split=None, unlabelled=unlabelled, scratch=scratch)
    return list_folder(root, name=name, unlabelled=unlabelled)


def _tables(source: Path, split: str | None) -> list[Path]:
    """The parquet files of a split, where a folder is laid out as data sets on the Hugging Face hub are."""
    found = sorted(
        path
        for pattern in ("*.parquet", "data/*.parquet", f"{split or '*'}/*.parquet")
        for path in source.glob(pattern)
    )
    found = list(dict.fromkeys(found))
    splits = sorted({_split_of(path, source) for path in found})
    if split is None and len(splits) > 1:
        raise SourceError(f"{source}: holds parquet files of several splits; choose one with --split: {some(splits)}")
    if split is not None and found and split not in splits:
        raise SourceError(f"{source}: has no parquet files of --split {split}; there are: {some(splits)}")
    return [path for path in found if split in (None, _split_of(path, source))]


def _split_of(path: Path, source: Path) -> str:
    """train of data/train-00000-of-00004.parquet and of train/0000.parquet."""
    if path.parent not in (source, source / "data"):
        return path.parent.name
    return path.stem.split("-")[0]


def list_file(path: Path, *, name: str) -> Listing:
    """List the images that a text file names, in its order: `path` or `path label` a line, below the file's own folder.

    A label is a number; after a tab it may be a class name too.
    raises: SourceError for missing files, and where only some lines have a label
    """
    root, lines = path.parent, read_names(path)
    pairs = [_split_line(line) for line in lines]
    labelled = [label is not None for _, label in pairs]
    if any(labelled) and not all(labelled):
        raise SourceError(
            f"{path}: {labelled.count(False)} of its {len(labelled)} images have no label, such as "
            f"{pairs[labelled.index(False)][0]}; give every line a label, or none"
        )
    missing = [entry for entry, _ in pairs if not (root / entry).is_file()]
    if missing or not pairs:
        raise SourceError(
            f"{path}: {len(missing)} of its {len(pairs)} images do not exist below {root} "
            f"({some(missing)}); write paths as seen from the list"
        )
    numbers, classes = _number([label for _, label in pairs if label is not None], name)
    items = [
        Item(entry, label, (root / entry).stat().st_size)
        for (entry, _), label in zip(pairs, numbers or [UNLABELLED] * len(pairs), strict=True)
    ]
    return Listing(name, items, FolderReader(root), classes)


def _split_line(line: str) -> tuple[str, str | None]:
    if "\t" in line:
        entry, label = line.split("\t", 1)
        return entry, label.strip()
    entry, _, last = line.rpartition(" ")
    return (entry.rstrip(), last) if entry and last.isdecimal() else (line, None)


def _number(labels: Sequence[str], name: str) -> tuple[list[int], tuple[str, ...] | None]:
    """Labels as numbers, with the names of the classes."""
    if not labels:
        return [], None
    if all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        return numbers, numbered_classes(numbers, name)
    classes = tuple(sorted(set(labels)))
    number = {label: position for position, label in enumerate(classes)}
    return [number[label] for label in labels], classes
