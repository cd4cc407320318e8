"""CIFAR-10, CIFAR-100 and STL-10 as they are handed out: a few files full of pixels."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.listing import UNLABELLED, Item, Listing, SourceError
from data_prep.names import some

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """One of the forms these data sets come in."""

    title: str
    splits: dict[str, tuple[str, ...]]
    """Files of each split."""
    load: Callable[[Path], tuple[Pixels, list[int]]]
    """Images (N, 3, side, side) and their labels, or none, of one file."""
    names: str
    """File with the names of the classes."""
    read_names: Callable[[Path], list[str]]


@dataclass(frozen=True)
class BinaryReader:
    """Gives an image as PPM, the plainest file with pixels in it; `where` is (file, row)."""

    root: Path
    title: str
    files: tuple[str, ...]

    def read(self, item: Item) -> bytes:
        number, row = item.where
        image = _load(self.root / self.files[number], self.title)[0][row].transpose(1, 2, 0)
        return f"P6 {image.shape[1]} {image.shape[0]} 255\n".encode() + np.ascontiguousarray(image).tobytes()


def recognise(folder: Path) -> str | None:
    """Title of the data set whose files lie in a folder, None for other folders."""
    for title, kind in KINDS.items():
        if all((folder / files[0]).is_file() for files in kind.splits.values()):
            return title
    return None


def list_binary(folder: Path, title: str, *, name: str, split: str | None) -> Listing:
    """List a split, in the order of its files. raises: SourceError."""
    kind = KINDS[title]
    if split not in kind.splits:
        raise SourceError(f"{folder}: holds {title}; choose one of its splits with --split: {some(list(kind.splits))}")
    files = kind.splits[split]
    items = [item for number, file in enumerate(files) for item in _items(folder / file, title, number)]
    names = kind.read_names(folder / kind.names)
    labelled = items[0].label != UNLABELLED
    if labelled and max(item.label for item in items) >= len(names):
        raise SourceError(f"{folder / kind.names}: names {len(names)} classes, fewer than the labels; fetch it again")
    return Listing(name, items, BinaryReader(folder, title, files), tuple(names) if labelled else None)


def _items(path: Path, title: str, number: int) -> list[Item]:
    images, labels = _load(path, title)
    size = images[0].size
    return [
        Item(f"{path.name}/{row:05d}", label, size, (number, row))
        for row, label in enumerate(labels or [UNLABELLED] * len(images))
    ]


@lru_cache(maxsize=1)
def _load(path: Path, title: str) -> tuple[Pixels, list[int]]:
    try:
        images, labels = KINDS[title].load(path)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file, {title} has it; fetch the data set again") from error
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise SourceError(f"{path}: not a file of {title} as it is handed out ({error!r}); fetch it again") from error
    if len(images) == 0 or (labels and len(labels) != len(images)):
        raise SourceError(f"{path}: holds {len(images)} images and {len(labels)} labels; fetch it again")
    return images, labels


class _Unpickler(pickle.Unpickler):
    """Rebuilds arrays and nothing else: a pickle may otherwise run any program."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED or module.split(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(path: Path) -> dict[bytes, Any]:
    with path.open("rb") as file:
        return dict(_Unpickler(file, encoding="bytes").load())


def _load_pickle(label: bytes) -> Callable[[Path], tuple[Pixels, list[int]]]:
    def load(path: Path) -> tuple[Pixels, list[int]]:
        batch = _unpickle(path)
        return np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32), [int(value) for value in batch[label]]

    return load


def _load_records(label_bytes: int) -> Callable[[Path], tuple[Pixels, list[int]]]:
    """Rows of one or two label bytes (the last one counts) and 3 x 32 x 32 pixels."""

    def load(path: Path) -> tuple[Pixels, list[int]]:
        rows = np.fromfile(path, np.uint8).reshape(-1, label_bytes + 3072)
        return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].tolist()

    return load


def _load_stl10(path: Path) -> tuple[Pixels, list[int]]:
    """Columns first, labels from 1 in a file of their own."""
    images = np.fromfile(path, np.uint8).reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
    labels = path.with_name(path.name.replace("_X", "_y"))
    return images, (np.fromfile(labels, np.uint8).astype(int) - 1).tolist() if labels.exists() else []


def _pickled_names(key: bytes) -> Callable[[Path], list[str]]:
    return lambda path: [name.decode() for name in _unpickle(path)[key]]


def _listed_names(path: Path) -> list[str]:
    return path.read_text().split()


_CIFAR10 = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}

KINDS = {
    "CIFAR-10": Kind("CIFAR-10", _CIFAR10, _load_pickle(b"labels"), "batches.meta", _pickled_names(b"label_names")),
    "CIFAR-100": Kind(
        "CIFAR-100",
        {"train": ("train",), "test": ("test",)},
        _load_pickle(b"fine_labels"),
        "meta",
        _pickled_names(b"fine_label_names"),
    ),
    "CIFAR-10 (binary)": Kind(
        "CIFAR-10 (binary)",
        {split: tuple(f"{file}.bin" for file in files) for split, files in _CIFAR10.items()},
        _load_records(1),
        "batches.meta.txt",
        _listed_names,
    ),
    "CIFAR-100 (binary)": Kind(
        "CIFAR-100 (binary)",
        {"train": ("train.bin",), "test": ("test.bin",)},
        _load_records(2),
        "fine_label_names.txt",
        _listed_names,
    ),
    "STL-10 (binary)": Kind(
        "STL-10 (binary)",
        {"train": ("train_X.bin",), "test": ("test_X.bin",), "unlabeled": ("unlabeled_X.bin",)},
        _load_stl10,
        "class_names.txt",
        _listed_names,
    ),
}
