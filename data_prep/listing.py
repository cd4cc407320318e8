"""What a source of images says of itself: names, labels and order, and how to fetch the bytes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".mpo"})
UNLABELLED = -1
MAX_CLASSES = 1 << 20
"""More is taken for a mistake, such as an image's number in the place of its label."""


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
            raise SourceError(
                f"{list_name}: {name} fits {len(matches)} images of {listing.name} ({matches[0].name}, "
                f"{matches[1].name} ...); write their paths below the source instead"
            )
        chosen.update(item.name for item in matches)
        unknown += [] if matches else [name]
    if unknown:
        raise SourceError(
            f"{list_name}: {len(unknown)} of {len(names)} names are not in {listing.name} "
            f"({some(unknown)}); take them out of the list, or give the source that has them"
        )
    if not chosen:
        raise SourceError(f"{list_name}: names no image; write one name a line")
    return replace(listing, items=[item for item in listing.items if item.name in chosen])


def numbered_classes(labels: Sequence[int], name: str) -> tuple[str, ...]:
    """Names for classes that have numbers only. raises: SourceError for numbers that cannot be classes."""
    if max(labels) >= MAX_CLASSES:
        raise SourceError(
            f"{name}: label {max(labels)} is no class number (at most {MAX_CLASSES - 1}); number the classes from 0"
        )
    return tuple(str(number) for number in range(max(labels) + 1))


def read_names(path: Path) -> list[str]:
    """Names of a text file, one a line; empty lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: a text file with one image name a line was wanted ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
