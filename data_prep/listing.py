"""What a source of images says of itself: names, labels and order, and how to fetch the bytes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from data_prep.names import NamesError, find_names

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


def take_subset(listing: Listing, names: Sequence[str], *, list_name: str, allow_missing: bool = False) -> Listing:
    """Keep the named items only, in the listing's order; classes keep their labels.

    names: as in the listing, or bare file names as in the SimCLR lists
    raises: SourceError for names that fit several files, or (unless allow_missing) none
    """
    try:
        places = find_names([item.name for item in listing.items], names, allow_missing=allow_missing)
    except NamesError as error:
        raise SourceError(f"{list_name}, for {listing.name}: {error}") from None
    taken = replace(listing, items=[listing.items[place] for place in places])
    missing = len(set(names)) - len(places)
    return replace(taken, notes=(*listing.notes, f"{missing} names of {list_name} are not there")) if missing else taken


def numbered_classes(labels: Sequence[int], name: str) -> tuple[str, ...]:
    """Names for classes that have numbers only. raises: SourceError for numbers that cannot be classes."""
    if max(labels) >= MAX_CLASSES:
        raise SourceError(
            f"{name}: label {max(labels)} is no class number (at most {MAX_CLASSES - 1}); number the classes from 0"
        )
    return tuple(str(number) for number in range(max(labels) + 1))
