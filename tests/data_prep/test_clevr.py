"""Labels of CLEVR out of its scenes: the classes of VISSL, for each of the ways in which scenes are handed out."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_prep.schema import open_beton, read_labels, sample_names
from data_prep.sources import Listing, SourceError, list_source

MINI = Path(__file__).parents[2].parent / "shared" / "data" / "clevr_mini"

Depths = dict[str, Sequence[float]]


def scene(name: str, depths: Sequence[float]) -> dict[str, object]:
    return {"image_filename": name, "objects": [{"pixel_coords": [10, 20, depth], "shape": "cube"} for depth in depths]}


def clevr(root: Path, depths: Depths, *, split: str = "") -> Path:
    """Images (empty files) and a scenes.json, or what CLEVR_v1.0 has for a split."""
    (root / "images" / split).mkdir(parents=True)
    (root / "scenes").mkdir(exist_ok=True)
    for name in depths:
        (root / "images" / split / name).write_bytes(b"")
    target = root / f"scenes/CLEVR_{split}_scenes.json" if split else root / "scenes.json"
    target.write_text(json.dumps({"info": {}, "scenes": [scene(name, each) for name, each in depths.items()]}))
    return root


def by_name(listing: Listing) -> dict[str, str]:
    assert listing.classes is not None
    return {item.name: listing.classes[item.label] for item in listing.items}


def test_counts_of_three_to_ten_are_eight_classes(tmp_path: Path) -> None:
    root = clevr(tmp_path, {"a.png": [9.0] * 3, "b.png": [9.0] * 10, "c.png": [9.0] * 4})
    listing = list_source(root, labels="clevr_count")
    assert [item.label for item in listing.items] == [0, 7, 1]
    assert listing.classes == tuple(f"count_{count}" for count in range(3, 11))
    assert not listing.notes


def test_other_counts_have_classes_of_their_own_and_are_spoken_of(tmp_path: Path) -> None:
    listing = list_source(clevr(tmp_path, {"a.png": [9.0], "b.png": [9.0] * 5}), labels="clevr_count")
    assert by_name(listing) == {"a.png": "count_1", "b.png": "count_5"}
    assert len(listing.classes or ()) == 10
    assert "10 classes, where Clevr/Count (3 to 10) has 8" in listing.notes[0]


@pytest.mark.parametrize("count", [0, 11])
def test_an_image_of_none_or_more_than_ten_objects_is_refused(count: int, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"clevr_count knows 1 to 10"):
        list_source(clevr(tmp_path, {"a.png": [9.0] * count, "b.png": [9.0] * 5}), labels="clevr_count")


@pytest.mark.parametrize(
    ("depths", "wanted"),
    [
        ([12.0, 7.99], "below_8.0"),
        ([8.0, 20.0], "below_8.0"),
        ([8.01], "below_8.5"),
        ([9.5, 9.6], "below_9.5"),
        ([9.51], "below_10.0"),
        ([10.01, 99.0], "below_100.0"),
    ],
)
def test_the_nearest_object_decides_and_an_upper_end_belongs_to_its_class(
    depths: list[float], wanted: str, tmp_path: Path
) -> None:
    listing = list_source(clevr(tmp_path, {"a.png": depths}), labels="clevr_dist")
    assert by_name(listing) == {"a.png": wanted}
    assert len(listing.classes or ()) == 6


@pytest.mark.parametrize("depths", [[], [100.5]])
def test_an_image_without_a_near_object_is_refused(depths: list[float], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="clevr_dist has no class for it"):
        list_source(clevr(tmp_path, {"a.png": depths}), labels="clevr_dist")


def test_a_split_of_clevr_v1_takes_its_own_images_and_scenes(tmp_path: Path) -> None:
    clevr(tmp_path, {"CLEVR_train_0.png": [9.0] * 3}, split="train")
    root = clevr(tmp_path, {"CLEVR_val_0.png": [9.0] * 6}, split="val")
    (root / "scenes/CLEVR_train_scenes.json").write_text("not read for val")
    assert by_name(list_source(root, labels="clevr_count", split="val")) == {"CLEVR_val_0.png": "count_6"}


def test_splits_are_not_mixed_unasked(tmp_path: Path) -> None:
    clevr(tmp_path, {"CLEVR_train_0.png": [9.0] * 3}, split="train")
    root = clevr(tmp_path, {"CLEVR_val_0.png": [9.0] * 6}, split="val")
    with pytest.raises(SourceError, match="--split train"):
        list_source(root, labels="clevr_count")


def test_scenes_one_a_file_say_the_same_as_all_in_one(tmp_path: Path) -> None:
    depths: Depths = {"a.png": [9.0] * 3, "b.png": [8.2] * 4}
    together, single = clevr(tmp_path / "together", depths), clevr(tmp_path / "single", depths)
    (single / "scenes.json").unlink()
    for name, each in depths.items():
        (single / "scenes" / name).with_suffix(".json").write_text(json.dumps(scene(name, each)))
    for labels in ("clevr_count", "clevr_dist"):
        assert by_name(list_source(together, labels=labels)) == by_name(list_source(single, labels=labels))


def drop_scene(root: Path) -> None:
    (root / "images/z.png").write_bytes(b"")


def drop_scenes(root: Path) -> None:
    (root / "scenes.json").unlink()


def drop_images(root: Path) -> None:
    (root / "images").rename(root / "pictures")


def contradict(root: Path) -> None:
    for number, depths in enumerate(([9.0], [9.1])):
        (root / f"scenes/{number}.json").write_text(json.dumps(scene("a.png", depths)))


def spoil(root: Path) -> None:
    (root / "scenes.json").write_text('{"scenes": [{"image_filename": "a.png"}]}')


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (drop_scene, r"1 of 2 images have no scene \(z.png\)"),
        (drop_scenes, "has neither scenes/"),
        (drop_images, "has no folder images"),
        (contradict, "says of a.png something else"),
        (spoil, "not a CLEVR scene file .*objects"),
    ],
)
def test_what_is_no_whole_clevr_is_refused(fault: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    root = clevr(tmp_path, {"a.png": [9.0] * 3})
    fault(root)
    with pytest.raises(SourceError, match=said):
        list_source(root, labels="clevr_count")


def test_labels_and_unlabelled_contradict_each_other(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, said = run("convert", tmp_path, tmp_path / "x.beton", "--labels", "clevr_count", "--unlabelled")
    assert code == 2
    assert "give one of the two" in said


@pytest.mark.shared
@pytest.mark.skipif(not MINI.is_dir(), reason="needs ../shared/data/clevr_mini beside the checkout")
@pytest.mark.parametrize("labels", ["clevr_count", "clevr_dist"])
def test_real_renders_get_the_labels_of_their_scenes(
    labels: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "clevr.beton"
    assert run("convert", MINI, out, "--labels", labels, "--workers", "1")[0] == 0
    info, found = open_beton(out), {}
    assert info.classes is not None
    for name, label in zip(sample_names(out), read_labels(out), strict=True):
        found[name] = info.classes[label]
    for name, given in found.items():
        things = json.loads((MINI / "scenes" / name).with_suffix(".json").read_text())["objects"]
        nearest = min(thing["pixel_coords"][2] for thing in things)
        expected = next(f"below_{end}" for end in (8.0, 8.5, 9.0, 9.5, 10.0, 100.0) if nearest <= end)
        assert given == (f"count_{len(things)}" if labels == "clevr_count" else expected)
    assert len(found) == 11
