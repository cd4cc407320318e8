"""The .beton file itself: FFCV's layout, written in order by one process and read without decoding a pixel.

FFCV's own DatasetWriter lets every worker append its pages in whatever order they finish, waits for ever when one of
them dies, and marks the file as valid before the first byte of data is there. This writer uses FFCV's own structures,
so its readers see no difference, but the same samples always give the same bytes, and the header comes last.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

PAGE_SIZE = 1 << 23
"""8 MiB, the default of FFCV's DatasetWriter; no sample may cross a page."""
JPEG_MODE, RAW_MODE = 0, 1
"""Values of an image's `mode`, as in ffcv.fields.rgb_image.IMAGE_MODES."""
FIELDS = ("image", "label")

Records = npt.NDArray[Any]
"""A structured array: one row a sample or a field."""


class BetonError(ValueError):
    """A file is not the .beton that was wanted; says what was wanted, what came and what to do."""


@cache
def ffcv_types() -> ModuleType:
    """FFCV's own structure definitions, imported late because that takes seconds."""
    import ffcv.types

    return ffcv.types  # type: ignore[no-any-return]


class BetonWriter:
    """Writes samples one after the other, laid out as by FFCV's DatasetWriter with one worker."""

    def __init__(self, path: Path, *, capacity: int, page_size: int = PAGE_SIZE) -> None:
        """Room is kept for the metadata of `capacity` samples; fewer may come."""
        from ffcv.fields import IntField, RGBImageField

        types = ffcv_types()
        self._types = types
        self._fields = dict(zip(FIELDS, (RGBImageField("jpg"), IntField()), strict=True))
        self._metadata = np.zeros(capacity, types.get_metadata_type(list(self._fields.values())))
        self._table = np.zeros(capacity, types.ALLOC_TABLE_TYPE)
        self._page_size = page_size
        self._metadata_start = types.HeaderType.itemsize + len(FIELDS) * types.FieldDescType.itemsize
        self._end = _round_up(self._metadata_start + self._metadata.nbytes, page_size)
        self.num_samples = 0
        self._file = path.open("xb")

    def add(self, data: bytes, *, width: int, height: int, label: int) -> int:
        """Append one JPEG; returns its sample id, the row index in the file."""
        if not 0 < len(data) <= self._page_size:
            raise ValueError(f"a sample must have 1 to {self._page_size} bytes, got {len(data)}")
        pointer = self._end
        if pointer % self._page_size + len(data) > self._page_size:
            pointer = _round_up(pointer, self._page_size)
        self._file.seek(pointer)
        self._file.write(data)
        sample_id = self.num_samples
        self._metadata[sample_id] = ((JPEG_MODE, width, height, pointer), label)
        self._table[sample_id] = (sample_id, pointer, len(data))
        self._end = pointer + len(data)
        self.num_samples += 1
        return sample_id

    def finish(self) -> None:
        """Write the metadata and the allocation table and, once those are on disk, the header that makes it valid."""
        table_start = _round_up(self._end, self._page_size)
        self._file.seek(table_start)
        self._file.write(self._table[: self.num_samples].tobytes())
        self._file.seek(self._types.HeaderType.itemsize)
        self._file.write(self._field_descriptors().tobytes())
        self._file.write(self._metadata[: self.num_samples].tobytes())
        self._sync()
        self._file.seek(0)
        self._file.write(self._header(table_start).tobytes())
        self._sync()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _header(self, table_start: int) -> Records:
        header = np.zeros(1, self._types.HeaderType)
        header["version"] = self._types.CURRENT_VERSION
        header["num_fields"] = len(FIELDS)
        header["page_size"] = self._page_size
        header["num_samples"] = self.num_samples
        header["alloc_table_ptr"] = table_start
        return header

    def _field_descriptors(self) -> Records:
        ids = {handler: number for number, handler in self._types.TYPE_ID_HANDLER.items()}
        descriptors = np.zeros(len(FIELDS), self._types.FieldDescType)
        for row, (name, field) in zip(descriptors, self._fields.items(), strict=True):
            row["type_id"] = ids[type(field)]
            row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), "<u1")
            row["arguments"][:] = field.to_binary()[0]
        return descriptors

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True)
class Layout:
    """What a .beton says of itself, FFCV's or ours."""

    path: Path
    page_size: int
    num_samples: int
    fields: dict[str, str]
    """Field name to the name of FFCV's field class."""
    image: Records
    """(N,) mode, width, height, data_ptr."""
    labels: npt.NDArray[np.int64] | None
    """(N,), None where the file has no field of that name."""
    table: Records
    """(A,) sample_id, ptr, size; in order of ptr."""

    def sizes(self) -> npt.NDArray[np.int64]:
        """Stored bytes of every image, (N,). raises: BetonError where an image has no place in the table."""
        pointers = self.image["data_ptr"]
        rows = np.minimum(np.searchsorted(self.table["ptr"], pointers), len(self.table) - 1)
        wrong = np.flatnonzero(self.table["ptr"][rows] != pointers)
        if wrong.size:
            raise BetonError(
                f"{self.path}: {wrong.size} of {self.num_samples} samples (first: {wrong[0]}) have no "
                "entry in the allocation table: the file is damaged; convert it again"
            )
        return self.table["size"][rows].astype(np.int64)


def read_layout(path: Path) -> Layout:
    """Read header, field descriptors, metadata and allocation table.

    raises: BetonError for anything but a complete .beton with an RGB image field named `image`
    """
    types = ffcv_types()
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise BetonError(
            f"{path}: a .beton file was wanted, found {what}; make one with `python -m data_prep convert SRC {path}`"
        )
    size = path.stat().st_size
    header = _read(path, types.HeaderType, 1, 0, size, "header")[0]
    _check_header(path, header, types.CURRENT_VERSION, size)
    descriptors = _read(path, types.FieldDescType, int(header["num_fields"]), types.HeaderType.itemsize, size, "fields")
    handlers = _handlers(path, descriptors)
    start = types.HeaderType.itemsize + descriptors.nbytes
    dtype = types.get_metadata_type(list(handlers.values()))
    metadata = _read(path, dtype, int(header["num_samples"]), start, size, "metadata")
    columns = dict(zip(handlers, dtype.names or (), strict=True))
    return Layout(
        path=path,
        page_size=int(header["page_size"]),
        num_samples=int(header["num_samples"]),
        fields={name: type(handler).__name__ for name, handler in handlers.items()},
        image=metadata[columns["image"]],
        labels=metadata[columns["label"]].astype(np.int64) if "label" in columns else None,
        table=_read_table(path, int(header["alloc_table_ptr"]), size),
    )


def _check_header(path: Path, header: Any, version: int, size: int) -> None:
    page_size = int(header["page_size"])
    if header["version"] != version or page_size < 1 << 21 or page_size & (page_size - 1):
        raise BetonError(
            f"{path}: not a .beton file of FFCV (wanted version {version} and a page size that is a power "
            f"of two, found {header['version']} and {page_size}); convert the images again"
        )
    if header["alloc_table_ptr"] == 0:
        raise BetonError(
            f"{path}: the conversion that wrote this file was killed before its end (no allocation "
            "table); delete it and convert again"
        )
    if header["num_samples"] == 0:
        raise BetonError(f"{path}: holds no samples; convert a folder with images in it")
    if header["alloc_table_ptr"] >= size:
        raise BetonError(
            f"{path}: cut short (its allocation table should begin at byte {header['alloc_table_ptr']}, "
            f"the file ends at {size}); copy or convert it again"
        )


def _handlers(path: Path, descriptors: Records) -> dict[str, Any]:
    known = ffcv_types().TYPE_ID_HANDLER
    handlers = {}
    for row in descriptors:
        name = row["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
        handler = known.get(int(row["type_id"]))
        if handler is None:
            raise BetonError(
                f"{path}: field {name!r} is of a custom type ({row['type_id']}), which only its author "
                "can read; write it again with FFCV's own field types"
            )
        handlers[name] = handler.from_binary(row["arguments"])
    _check_fields(path, {name: type(handler).__name__ for name, handler in handlers.items()})
    return handlers


def _check_fields(path: Path, kinds: dict[str, str]) -> None:
    listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
    if kinds.get("image") != "RGBImageField":
        raise BetonError(
            f"{path}: an RGBImageField named image was wanted, its fields are: {listing}; convert the "
            "images with data_prep, or name that field image when writing with FFCV"
        )
    if kinds.get("label", "IntField") != "IntField":
        raise BetonError(f"{path}: the field named label must be an IntField, its fields are: {listing}")


def _read_table(path: Path, start: int, size: int) -> Records:
    dtype = ffcv_types().ALLOC_TABLE_TYPE
    rows, rest = divmod(size - start, dtype.itemsize)
    if rows == 0 or rest:
        raise BetonError(
            f"{path}: its allocation table is cut short or empty ({size - start} bytes, {dtype.itemsize} "
            "a sample); copy or convert it again"
        )
    table = _read(path, dtype, rows, start, size, "allocation table")
    ordered = table if (np.diff(table["ptr"].astype(np.int64)) > 0).all() else table[np.argsort(table["ptr"])]
    if int(ordered["ptr"][-1]) + int(ordered["size"][-1]) > start:
        raise BetonError(f"{path}: its allocation table points past the data; the file is damaged, convert it again")
    return ordered


def _read(path: Path, dtype: np.dtype[Any], count: int, offset: int, size: int, what: str) -> Records:
    if offset + count * dtype.itemsize > size:
        raise BetonError(f"{path}: not a complete .beton file ({size} bytes, too few for its {what}); convert it again")
    return np.memmap(path, dtype, "r", offset, count)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
