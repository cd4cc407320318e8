"""Parquet files as the Hugging Face hub has them."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.convert import convert
from data_prep.images import Encoding
from data_prep.sources import SourceError, list_source

pa: Any = pytest.importorskip("pyarrow", reason="parquet needs pyarrow, an extra")
parquet: Any = pytest.importorskip("pyarrow.parquet")

FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["brick_square", "b", "c"]}}


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> None:
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=4)


@pytest.fixture
def samples(images: Path) -> tuple[list[dict[str, Any]], list[int]]:
    items = list_source(images).items
    return [{"bytes": (images / item.name).read_bytes(), "path": item.name} for item in items], [
        item.label for item in items
    ]


def test_a_data_set_of_the_hub_gives_the_same_file_as_its_folder(
    samples: tuple[list[dict[str, Any]], list[int]], converted: Path, tmp_path: Path
) -> None:
    images, labels = samples
    for number, part in enumerate((slice(0, 11), slice(11, None))):
        write(
            tmp_path / "hub" / "data" / f"train-0000{number}-of-00002.parquet",
            {"label": labels[part], "image": images[part]},
            FEATURES,
        )
    write(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", {"label": [-1], "image": images[:1]}, FEATURES)
    with pytest.raises(SourceError, match="several splits; choose one with --split: test, train"):
        list_source(tmp_path / "hub")
    listing = list_source(tmp_path / "hub", split="train")
    assert listing.classes == ("brick_square", "b", "c")
    assert listing.items[-1].name == "train-00001-of-00002/0000006"
    convert(listing, tmp_path / "x.beton", encoding=Encoding(max_size=64), workers=2)
    assert (tmp_path / "x.beton").read_bytes() == converted.read_bytes()
    assert list_source(tmp_path / "hub", split="test").classes is None


def test_a_single_table_with_plain_bytes_and_numbers_is_read(
    samples: tuple[list[dict[str, Any]], list[int]], tmp_path: Path
) -> None:
    images, labels = samples
    write(tmp_path / "x.parquet", {"jpg": [image["bytes"] for image in images], "label": labels, "caption": ["a"] * 18})
    listing = list_source(tmp_path / "x.parquet")
    assert [item.label for item in listing.items] == labels
    assert listing.classes == ("0", "1", "2")
    assert [listing.reader.read(item) for item in listing.items] == [image["bytes"] for image in images]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "label": [1]}, "one column of images .* was wanted, found nothing; its columns: text, label"),
        ({"a": [b"1"], "b": [b"1"]}, "one column of images .* found a, b"),
        ({"image": [b"1"], "label": ["cat"]}, "must hold class numbers, found 'cat'"),
        ({"image": [b"1", b"2"], "label": [1, None]}, "1 of 2 rows have no label"),
    ],
)
def test_tables_that_make_no_sense_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write(tmp_path / "x.parquet", columns)
    with pytest.raises(SourceError, match=message):
        list_source(tmp_path / "x.parquet")


def test_a_damaged_table_is_refused_and_an_image_elsewhere_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(SourceError, match="not a parquet file"):
        list_source(tmp_path / "x.parquet")
    write(tmp_path / "y.parquet", {"image": [{"bytes": None, "path": "a.jpg"}]})
    listing = list_source(tmp_path / "y.parquet")
    with pytest.raises(OSError, match="not in the table"):
        listing.reader.read(listing.items[0])
