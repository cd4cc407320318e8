"""Parquet files as the Hugging Face hub has them: a column of images, a column of labels. Needs pyarrow."""

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.listing import UNLABELLED, Item, Listing, SourceError, numbered_classes
from data_prep.names import some

LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
"""What a column of labels is called where the file does not say so itself; the first that is there counts."""


@dataclass(frozen=True)
class TableReader:
    """Reads images out of row groups; `where` is (file, row group, row in it)."""

    files: tuple[Path, ...]
    column: str

    def read(self, item: Item) -> bytes:
        number, group, row = item.where
        value = _row_group(self.files[number], group, self.column)[row]
        if not isinstance(value, bytes):
            raise OSError("the image is not in the table but somewhere else")
        return value


@dataclass(frozen=True)
class Columns:
    """Where a table has its images and labels."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def list_tables(files: Sequence[Path], *, name: str) -> Listing:
    """List the rows of parquet files, in their order. raises: SourceError."""
    columns = _columns(_open(files[0]), files[0])
    items = [item for number, path in enumerate(files) for item in _items(path, number, columns)]
    if not items:
        raise SourceError(f"{name}: its {len(files)} parquet files have no rows; fetch them again")
    unlabelled = sum(item.label == UNLABELLED for item in items)
    if 0 < unlabelled < len(items):
        raise SourceError(f"{name}: {unlabelled} of {len(items)} rows have no label; remove those rows, or all labels")
    classes = None if unlabelled else columns.classes or numbered_classes([item.label for item in items], name)
    return Listing(name, items, TableReader(tuple(files), columns.image), classes)


def _columns(table: Any, path: Path) -> Columns:
    schema = table.schema_arrow
    features = _features(schema)
    images = [field.name for field in schema if _is_image(field.type)]
    if len(images) != 1:
        raise SourceError(
            f"{path}: one column of images (bytes, or a struct with a field bytes) was wanted, found "
            f"{some(images)}; its columns: {some(schema.names, 20)}"
        )
    named = [
        column
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    ]
    candidates = [column for column in LABEL_COLUMNS if column in (named or schema.names)] or named
    label = candidates[0] if candidates else None
    classes = features.get(label or "", {}).get("names") if label in named else None
    return Columns(images[0], label, tuple(classes) if classes else None)


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's `datasets` wrote about the columns."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    return dict(json.loads(text).get("info", {}).get("features", {}))


def _is_image(kind: Any) -> bool:
    types = importlib.import_module("pyarrow").types
    if types.is_struct(kind):
        return int(kind.get_field_index("bytes")) >= 0
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _items(path: Path, number: int, columns: Columns) -> Iterator[Item]:
    table = _open(path)
    names = table.schema_arrow.names
    if columns.image not in names or (columns.label or columns.image) not in names:
        raise SourceError(
            f"{path}: has no columns {columns.image} and {columns.label}, as the first file has; its "
            f"columns: {some(names, 20)}"
        )
    row = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        labels = _labels(table, group, columns.label, path) if columns.label else [UNLABELLED] * count
        mean_bytes = table.metadata.row_group(group).total_byte_size // max(count, 1)  # sizes of rows are not on record
        for place, label in enumerate(labels):
            yield Item(f"{path.stem}/{row:07d}", label, mean_bytes, (number, group, place))
            row += 1


def _labels(table: Any, group: int, column: str, path: Path) -> list[int]:
    values = table.read_row_group(group, columns=[column]).column(column).to_pylist()
    wrong = [value for value in values if not isinstance(value, int | None)]
    if wrong:
        raise SourceError(f"{path}: column {column} must hold class numbers, found {wrong[0]!r}; number the classes")
    return [UNLABELLED if value is None else value for value in values]


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int, column: str) -> list[Any]:
    """The encoded images of a row group. One is kept: neighbouring rows are read one after the other."""
    values = _open(path).read_row_group(group, columns=[column]).column(column).to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in values]


def _open(path: Path) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise SourceError(f"{path}: reading parquet needs pyarrow; pip install 'featherweight[parquet]'") from error
    try:
        return parquet.ParquetFile(path)
    except importlib.import_module("pyarrow").ArrowException as error:
        raise SourceError(f"{path}: not a parquet file that can be read ({error}); fetch it again") from error
