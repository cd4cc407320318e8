"""The embedded data set is the same everywhere, and its pixels do not give the classes away."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from data_prep.kinds import CLASSES
from data_prep.synth import MARKER, Picture, Plan, draw_jpeg

Run = Callable[..., tuple[int, str, str]]
DRAW = ("--images-per-class", 3, "--val-per-class", 2, "--size", 32, 48)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_the_data_set_is_the_same_whatever_the_number_of_workers(tmp_path: Path, run: Run) -> None:
    for workers in (1, 3):
        assert run("synth", tmp_path / str(workers), *DRAW, "--workers", workers)[0] == 0
    drawn = contents(tmp_path / "1")
    assert drawn == contents(tmp_path / "3")
    assert len(drawn) == len(set(drawn.values())) == len(CLASSES) * 5
    assert {name.split("/")[1] for name in drawn} == set(CLASSES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_picture_depends_on_seed_split_class_and_index_alone() -> None:
    plan = Plan(size=(32, 48))
    base = draw_jpeg(plan, Picture("train", 1, 2))
    assert base == draw_jpeg(Plan(9, 9, size=(32, 48)), Picture("train", 1, 2))
    others = [Picture("val", 1, 2), Picture("train", 2, 2), Picture("train", 1, 3)]
    assert all(draw_jpeg(plan, other) != base for other in others)
    assert draw_jpeg(Plan(seed=1, size=(32, 48)), Picture("train", 1, 2)) != base


def test_classes_are_in_the_order_of_their_folders() -> None:
    assert sorted(CLASSES) == list(CLASSES)
    assert len(CLASSES) >= 10


def test_drawing_again_is_up_to_date_and_other_settings_are_refused(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "set"
    assert "60 images drawn" in run("synth", out, *DRAW)[1]
    assert "up to date" in run("synth", out, *DRAW)[1]
    code, _, error = run("synth", out, *DRAW, "--seed", 1)
    assert (code, "with other settings" in error) == (2, True)
    next(out.glob("train/*/*.jpg")).unlink()
    assert "holds 59 of 60" in run("synth", out, *DRAW)[2]
    assert run("synth", out, *DRAW, "--overwrite")[0] == 0
    assert len(contents(out)) == 60


def test_a_folder_that_synth_did_not_draw_is_never_touched(tmp_path: Path, run: Run) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    code, _, error = run("synth", tmp_path / "mine", *DRAW, "--overwrite")
    assert (code, f"no {MARKER}" in error) == (2, True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("arguments", [("--images-per-class", 0), ("--size", 99, 50), ("--seed", -1)])
def test_impossible_plans_are_refused(tmp_path: Path, run: Run, arguments: tuple[object, ...]) -> None:
    assert run("synth", tmp_path / "x", *arguments)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_raw_pixels_hardly_tell_the_classes() -> None:
    train = [(label, pixels_of("train", label, index)) for label in range(len(CLASSES)) for index in range(25)]
    val = [(label, pixels_of("val", label, index)) for label in range(len(CLASSES)) for index in range(10)]
    bank = np.stack([pixels for _, pixels in train])
    hits = sum(nearest_label(bank, [label for label, _ in train], pixels) == label for label, pixels in val)
    assert hits / len(val) < 0.35


def pixels_of(split: str, label: int, index: int) -> npt.NDArray[np.float64]:
    data = np.frombuffer(draw_jpeg(Plan(), Picture(split, label, index)), np.uint8)
    small = cv2.resize(cv2.imdecode(data, cv2.IMREAD_COLOR), (16, 16), interpolation=cv2.INTER_AREA)
    flat = small.reshape(-1).astype(np.float64) / 255
    return flat / np.linalg.norm(flat)


def nearest_label(bank: npt.NDArray[np.float64], labels: list[int], pixels: npt.NDArray[np.float64]) -> int:
    """k-NN as in evaluation: k 20, cosine, weights exp(similarity / 0.07)."""
    similarity = bank @ pixels
    votes = np.zeros(len(CLASSES))
    for row in np.argsort(similarity)[-20:]:
        votes[labels[row]] += np.exp(similarity[row] / 0.07)
    return int(votes.argmax())
