"""CIFAR and STL-10 files, made here in the layout that their authors document."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_prep.images import decode_with_pillow
from data_prep.sources import Listing, SourceError, list_source

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
LABELS = [int(label) for label in RNG.integers(0, 3, 10)]
LARGE = RNG.integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
NAMES = ["cat", "dog", "eel"]


def dump(path: Path, value: object) -> None:
    """As Python 2 pickled them: keys and texts come back as bytes."""
    path.write_bytes(pickle.dumps(value, protocol=2))


def rows(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def cifar10(at: Path) -> None:
    for number in range(5):
        part = slice(2 * number, 2 * number + 2)
        dump(at / f"data_batch_{number + 1}", {b"data": rows(TRAIN[part]), b"labels": LABELS[part]})
    dump(at / "test_batch", {b"data": rows(TRAIN), b"labels": LABELS})
    dump(at / "batches.meta", {b"label_names": [name.encode() for name in NAMES]})


def cifar100(at: Path) -> None:
    for split in ("train", "test"):
        dump(at / split, {b"data": rows(TRAIN), b"fine_labels": LABELS, b"coarse_labels": [0] * 10})
    dump(at / "meta", {b"fine_label_names": [name.encode() for name in NAMES]})


def binary(at: Path, files: dict[str, slice], label_bytes: int, names: str) -> None:
    for file, part in files.items():
        labels = np.array(LABELS[part], np.uint8)[:, None]
        head = np.hstack([np.full((len(labels), label_bytes - 1), 99, np.uint8), labels])
        (at / file).write_bytes(np.hstack([head, rows(TRAIN[part])]).tobytes())
    (at / names).write_text("\n".join(NAMES) + "\n\n")


def cifar10_binary(at: Path) -> None:
    files = {f"data_batch_{number + 1}.bin": slice(2 * number, 2 * number + 2) for number in range(5)}
    binary(at, {**files, "test_batch.bin": slice(None)}, 1, "batches.meta.txt")


def cifar100_binary(at: Path) -> None:
    binary(at, {"train.bin": slice(None), "test.bin": slice(None)}, 2, "fine_label_names.txt")


def stl10(at: Path) -> None:
    for split in ("train", "test", "unlabeled"):
        (at / f"{split}_X.bin").write_bytes(LARGE.transpose(0, 3, 2, 1).tobytes())
    for split in ("train", "test"):
        (at / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in LABELS[:4]))
    (at / "class_names.txt").write_text("\n".join(NAMES))


def pixels(listing: Listing) -> npt.NDArray[Any]:
    return np.stack([decode_with_pillow(listing.reader.read(item))[:, :, ::-1] for item in listing.items])


@pytest.mark.parametrize("make", [cifar10, cifar100, cifar10_binary, cifar100_binary, stl10])
def test_every_pixel_and_label_comes_back(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    images = LARGE if make is stl10 else TRAIN
    for split in ("train", "test"):
        listing = list_source(tmp_path, split=split)
        assert np.array_equal(pixels(listing), images)
        assert [item.label for item in listing.items] == LABELS[: len(images)]
        assert listing.classes == tuple(NAMES)
    with pytest.raises(SourceError, match=r"choose one of its splits with --split: train, test"):
        list_source(tmp_path)


def test_stl10_has_images_without_labels(tmp_path: Path) -> None:
    stl10(tmp_path)
    listing = list_source(tmp_path, split="unlabeled")
    assert ([item.label for item in listing.items], listing.classes) == ([-1] * 4, None)
    assert np.array_equal(pixels(listing), LARGE)


def test_a_cut_or_missing_file_is_refused(tmp_path: Path) -> None:
    cifar10(tmp_path)
    whole = (tmp_path / "data_batch_3").read_bytes()
    (tmp_path / "data_batch_3").write_bytes(whole[:1000])
    with pytest.raises(SourceError, match="data_batch_3: not a file of CIFAR-10"):
        list_source(tmp_path, split="train")
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(SourceError, match="data_batch_3: no such file"):
        list_source(tmp_path, split="train")


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch trapped",)


def test_a_pickle_cannot_run_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path)
    monkeypatch.chdir(tmp_path)
    dump(tmp_path / "data_batch_1", {b"data": Trap(), b"labels": []})
    with pytest.raises(SourceError, match="has no place in it"):
        list_source(tmp_path, split="train")
    assert not Path("trapped").exists()
