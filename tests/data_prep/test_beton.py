"""The file format: FFCV must not be able to tell our files from its own."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.beton import BetonWriter, ffcv_types, read_layout
from data_prep.convert import convert
from data_prep.images import Encoding, decode_with_pillow
from data_prep.schema import BetonError, open_beton, read_labels, read_samples
from data_prep.sources import list_source


def test_a_file_is_byte_for_byte_what_ffcvs_own_writer_makes(converted: Path, written_by_ffcv: dict[str, Path]) -> None:
    assert converted.read_bytes() == written_by_ffcv["jpg"].read_bytes()


@pytest.fixture(scope="module")
def copied_jpegs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of every kind that the fidelity profile keeps: colour and grey, baseline and progressive, 4:4:4."""
    root = tmp_path_factory.mktemp("fidelity")
    for number, path in enumerate(sorted(images.glob("*/*.jpg"))):
        folder = root / "source" / str(number % 4)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("L" if number % 3 == 0 else "RGB")
        image.save(folder / path.name, progressive=number % 2 == 0, subsampling=0, quality=95)
    convert(list_source(root / "source"), root / "x.beton", encoding=Encoding(None, copy_jpeg=True))
    return root / "x.beton"


LOADERS: list[object] = []
"""Kept to the end: numba complains, harmlessly, when code that calls C functions is collected while tests run."""


@pytest.mark.parametrize(("os_cache", "kind"), [(True, "converted"), (False, "converted"), (True, "copied_jpegs")])
def test_ffcvs_loader_reads_every_image_and_label(request: pytest.FixtureRequest, os_cache: bool, kind: str) -> None:
    converted: Path = request.getfixturevalue(kind)
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption

    size = 24
    pipelines = {"image": [CenterCropRGBImageDecoder((size, size), 1.0)], "label": [IntDecoder()]}
    loader = Loader(
        str(converted),
        batch_size=5,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        pipelines=pipelines,
        drop_last=False,
    )
    LOADERS.append(loader)
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    pixels, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    assert labels[:, 0].tolist() == read_labels(converted).tolist()
    for loaded, (_, data) in zip(pixels, read_samples(converted), strict=True):
        expected = _center_crop(decode_with_pillow(data)[:, :, ::-1], size)
        assert np.abs(loaded.astype(int) - expected).mean() < 4  # FFCV decodes with libjpeg's fast, less exact DCT


def _center_crop(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    import cv2

    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = pixels[top : top + side, left : left + side]
    return np.asarray(cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA))


def test_no_sample_crosses_a_page_and_all_come_back(tmp_path: Path) -> None:
    page_size, rng = 1 << 21, np.random.default_rng(3)
    blobs = [rng.bytes(int(size)) for size in rng.integers(1, page_size, 24)] + [rng.bytes(page_size)] * 2
    with BetonWriter(tmp_path / "x.beton", capacity=40, page_size=page_size) as writer:
        for label, blob in enumerate(blobs):
            assert writer.add(blob, width=3, height=2, label=label) == label
        writer.finish()
    layout = read_layout(tmp_path / "x.beton")
    first, last = layout.table["ptr"], layout.table["ptr"] + layout.table["size"] - 1
    assert (first // page_size == last // page_size).all()
    assert [data for _, data in read_samples(tmp_path / "x.beton")] == blobs
    assert read_labels(tmp_path / "x.beton").tolist() == list(range(26))


@pytest.mark.parametrize("size", [0, (1 << 23) + 1])
def test_a_sample_that_fits_no_page_is_refused(tmp_path: Path, size: int) -> None:
    with BetonWriter(tmp_path / "x.beton", capacity=1) as writer, pytest.raises(ValueError, match="bytes, got"):
        writer.add(b"x" * size, width=1, height=1, label=0)


def test_a_file_whose_writer_did_not_finish_is_not_taken_for_a_data_set(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "x.beton", capacity=1) as writer:
        writer.add(b"data", width=1, height=1, label=0)
    with pytest.raises(BetonError, match=r"not a \.beton"):
        open_beton(tmp_path / "x.beton")


def _header(path: Path, field: str, value: int) -> None:
    header: Any = np.memmap(path, ffcv_types().HeaderType, "r+", 0, 1)
    header[field] = value
    header.flush()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 1, "not a .beton file of FFCV"),
        ("page_size", 12345, "power of two"),
        ("num_samples", 0, "no samples"),
        ("num_samples", 10**9, "too few for its metadata"),
        ("alloc_table_ptr", 0, "killed before its end"),
        ("alloc_table_ptr", 1 << 40, "cut short"),
        ("alloc_table_ptr", 77, "points past the data|cut short"),
    ],
)
def test_a_wrong_header_is_named(
    tmp_path: Path, written_by_ffcv: dict[str, Path], field: str, value: int, message: str
) -> None:
    path = tmp_path / "x.beton"
    shutil.copy(written_by_ffcv["jpg"], path)
    _header(path, field, value)
    with pytest.raises(BetonError, match=message):
        open_beton(path)


@pytest.mark.parametrize("keep", [0, 10, 24, 500, 2200, 1 << 23, -24, -1])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, written_by_ffcv: dict[str, Path], keep: int) -> None:
    data = written_by_ffcv["jpg"].read_bytes()
    (tmp_path / "x.beton").write_bytes(data[:keep])
    with pytest.raises(BetonError):
        open_beton(tmp_path / "x.beton")


def test_a_missing_file_a_folder_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.beton").write_text("hello " * 1000)
    for name, message in (("none.beton", "no such file"), ("", "a folder"), ("text.beton", "not a .beton")):
        with pytest.raises(BetonError, match=message):
            open_beton(tmp_path / name)


def test_a_file_without_an_image_field_is_refused_by_naming_its_fields(
    tmp_path: Path, written_by_ffcv: dict[str, Path]
) -> None:
    path = tmp_path / "x.beton"
    data = written_by_ffcv["jpg"].read_bytes()
    path.write_bytes(data.replace(b"image\0", b"photo\0", 1))
    with pytest.raises(BetonError, match=r"photo \(RGBImageField\), label \(IntField\)"):
        open_beton(path)


def test_files_of_ffcv_open_without_a_manifest(written_by_ffcv: dict[str, Path]) -> None:
    jpg, raw = open_beton(written_by_ffcv["jpg"]), open_beton(written_by_ffcv["raw"])
    assert (jpg.num_samples, jpg.labelled, jpg.has_manifest, jpg.classes, jpg.num_raw) == (18, True, False, None, 0)
    assert (raw.num_samples, raw.labelled, raw.num_raw) == (18, False, 18)
    assert read_labels(written_by_ffcv["raw"]).tolist() == [-1] * 18
    assert max(jpg.max_width, jpg.max_height) <= 64
    with pytest.raises(BetonError, match="raw pixels"):
        next(iter(read_samples(written_by_ffcv["raw"])))
