"""Which images a source holds, in which order, with which labels."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.names import NamesError, read_names
from data_prep.schema import read_rows, row_text
from data_prep.sources import SourceError, list_source, take_subset


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def names_and_labels(root: Path, **options: object) -> list[tuple[str, int]]:
    return [(item.name, item.label) for item in list_source(root, **options).items]


def test_class_folders_are_sorted_and_names_inside_them(tmp_path: Path) -> None:
    make(tmp_path, "b/2.jpg", "b/10.jpg", "B/1.PNG", "a/x.jpeg", "a-b/y.jpg")
    assert names_and_labels(tmp_path) == [
        ("B/1.PNG", 0),
        ("a/x.jpeg", 1),
        ("a-b/y.jpg", 2),
        ("b/10.jpg", 3),
        ("b/2.jpg", 3),
    ]
    assert list_source(tmp_path).classes == ("B", "a", "a-b", "b")


def test_files_deeper_down_belong_to_their_first_level_class(tmp_path: Path) -> None:
    make(tmp_path, "cat/white/1.jpg", "cat/0.jpg", "dog/x/y/z.jpg")
    assert names_and_labels(tmp_path) == [("cat/0.jpg", 0), ("cat/white/1.jpg", 0), ("dog/x/y/z.jpg", 1)]


def test_images_directly_in_the_folder_have_no_labels(tmp_path: Path) -> None:
    make(tmp_path, "2.jpg", "1.jpg", "notes/readme.txt")
    assert names_and_labels(tmp_path) == [("1.jpg", -1), ("2.jpg", -1)]
    assert list_source(tmp_path).classes is None


def test_images_both_in_the_folder_and_below_are_refused_unless_taken_without_labels(tmp_path: Path) -> None:
    make(tmp_path, "stray.jpg", "cat/1.jpg")
    with pytest.raises(SourceError, match=r"both images \(stray.jpg .*folders with images \(cat\).*--unlabelled"):
        list_source(tmp_path)
    assert names_and_labels(tmp_path, unlabelled=True) == [("cat/1.jpg", -1), ("stray.jpg", -1)]


def test_folders_of_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg")
    with pytest.raises(SourceError, match=r"look like splits.*--split train"):
        list_source(tmp_path)
    assert names_and_labels(tmp_path, split="val") == [("cat/2.jpg", 0)]
    with pytest.raises(SourceError, match="no folder test for --split test; its folders: train, val"):
        list_source(tmp_path, split="test")


def test_other_files_are_counted_and_hidden_ones_are_not_seen(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "a/notes.txt", "LICENSE", "a/.hidden.jpg", ".git/x.jpg", "a/._1.jpg")
    listing = list_source(tmp_path)
    assert [item.name for item in listing.items] == ["a/1.jpg"]
    assert listing.num_ignored == 2


def test_a_class_without_images_keeps_its_label_and_is_reported(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "c/1.jpg")
    (tmp_path / "b").mkdir()
    assert names_and_labels(tmp_path) == [("a/1.jpg", 0), ("c/1.jpg", 2)]
    assert "b" in list_source(tmp_path).notes[0]


def test_missing_empty_and_imageless_folders_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        list_source(tmp_path / "none")
    with pytest.raises(SourceError, match=r"no images found .no files at all"):
        list_source(tmp_path)
    make(tmp_path, "a/readme.md", "b.txt")
    with pytest.raises(SourceError, match=r"no images found \(1 .*\.jpg"):
        list_source(tmp_path)
    (tmp_path / "b.bin").touch()
    with pytest.raises(SourceError, match="not a known kind of source"):
        list_source(tmp_path / "b.bin")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make(tmp_path / "src", "a/1.jpg")
    make(tmp_path / "elsewhere", "2.jpg")
    (tmp_path / "src" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "src" / "a" / "up").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert names_and_labels(tmp_path / "src") == [("a/1.jpg", 0), ("a/gone.jpg", 0), ("b/2.jpg", 1)]


def test_a_subset_is_named_by_path_or_by_file_name(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg")
    listing = list_source(tmp_path)
    taken = take_subset(listing, ["3.jpg", "a/1.jpg"], list_name="list")
    assert [(item.name, item.label) for item in taken.items] == [("a/1.jpg", 0), ("b/3.jpg", 1)]
    assert taken.classes == ("a", "b")
    assert taken.sha256() != listing.sha256()


def test_unknown_and_ambiguous_names_of_a_subset_are_refused(tmp_path: Path) -> None:
    listing = list_source(make(tmp_path, "a/1.jpg", "b/1.jpg"))
    with pytest.raises(SourceError, match=r"list, for .*: 7 of 8 names .*x0, x1, x2, x3, x4 and 2 more"):
        take_subset(listing, ["a/1.jpg", *(f"x{number}" for number in range(7))], list_name="list")
    taken = take_subset(listing, ["a/1.jpg", "x0", "x1"], list_name="list", allow_missing=True)
    assert [item.name for item in taken.items] == ["a/1.jpg"]
    assert taken.notes == ("2 names of list are not there",)
    with pytest.raises(SourceError, match="names no image"):
        take_subset(listing, ["x0"], list_name="list", allow_missing=True)
    with pytest.raises(SourceError, match=r"1.jpg fits 2 images .*a/1.jpg, b/1.jpg"):
        take_subset(listing, ["1.jpg"], list_name="list")
    with pytest.raises(SourceError, match="names no image"):
        take_subset(listing, [], list_name="list")


def test_names_are_read_without_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("a.jpg\n\n  b.jpg  \r\n")
    assert read_names(tmp_path / "list") == ["a.jpg", "b.jpg"]
    with pytest.raises(NamesError, match="a text file"):
        read_names(tmp_path / "none")


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\\tnr\t\n\r"), max_size=12),
        min_size=2,
        max_size=2,
    )
)
def test_any_name_survives_a_table(tmp_path_factory: pytest.TempPathFactory, values: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "table.tsv"
    path.write_text(row_text(("one", "two")) + row_text(values), encoding="utf-8", newline="\n")
    assert [list(row.values()) for row in read_rows(path, ("one", "two"))] == [values]


def test_a_name_that_is_no_utf_8_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with open(os.fsencode(tmp_path) + b"/a/\xe9.jpg", "wb"):  # noqa: PTH123  (a name that str cannot write)
        pass
    listing = list_source(tmp_path)
    assert os.fsencode(listing.items[0].name) == b"a/\xe9.jpg"
    assert len(listing.sha256()) == 64
