"""Single images: whatever lies in a folder is stored rightly or refused with a reason."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.convert import convert
from data_prep.images import (
    BadImageError,
    Encoding,
    decode_with_pillow,
    encode_jpeg,
    jpeg_frame,
    shrink,
    store,
)
from data_prep.kinds import CLASSES
from data_prep.schema import left_out_path, read_rows, read_samples, sample_names
from data_prep.sources import Listing
from data_prep.synth import Picture, Plan, draw_jpeg

COPY = Encoding(max_size=None, copy_jpeg=True)
PLAN = Plan(seed=11, size=(48, 96))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(io.BytesIO(draw_jpeg(PLAN, Picture("train", 2, 0)))).convert("RGB")


@pytest.mark.parametrize(
    ("mode", "kind", "source_format"),
    [
        ("RGB", "JPEG", "JPEG/RGB"),
        ("L", "JPEG", "JPEG/L"),
        ("CMYK", "JPEG", "JPEG/CMYK"),
        ("P", "PNG", "PNG/P"),
        ("RGBA", "PNG", "PNG/RGBA"),
        ("LA", "PNG", "PNG/LA"),
        ("1", "PNG", "PNG/1"),
        ("RGB", "WEBP", "WEBP/RGB"),
        ("P", "GIF", "GIF/P"),
        ("RGB", "BMP", "BMP/RGB"),
        ("RGB", "PPM", "PPM/RGB"),
        ("CMYK", "TIFF", "TIFF/CMYK"),
    ],
)
def test_every_kind_of_image_is_stored_with_the_pixels_that_torchvision_would_show(
    photo: Image.Image, mode: str, kind: str, source_format: str
) -> None:
    data = encoded(photo.convert(mode), kind)
    stored = store(data, Encoding())
    assert stored.source_format == source_format
    assert stored.data == encode_jpeg(np.ascontiguousarray(pillow_rgb(data)[:, :, ::-1]), 90)
    assert Image.open(io.BytesIO(stored.data)).size == (stored.width, stored.height) == photo.size


def test_a_sixteen_bit_image_keeps_its_greys_instead_of_turning_white() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode_with_pillow(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(pixels[:, :, 1], ramp >> 8)


def test_exif_orientation_is_ignored_as_torchvision_ignores_it(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo, "JPEG", exif=exif)
    stored = store(data, Encoding())
    assert (stored.width, stored.height) == photo.size
    assert store(data, COPY).data == data


def test_the_longest_side_is_bounded_and_a_thin_image_keeps_a_pixel() -> None:
    stored = store(encoded(Image.new("RGB", (900, 3)), "PNG"), Encoding(max_size=100))
    assert (stored.width, stored.height) == (100, 1)
    assert shrink(np.zeros((50, 100, 3), np.uint8), 100).shape == (50, 100, 3)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}, {"restart_marker_blocks": 2}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fidelity_profile_keeps_the_bytes_of_sound_jpegs(
    photo: Image.Image, mode: str, options: dict[str, object]
) -> None:
    data = encoded(photo.convert(mode), "JPEG", **options)
    stored = store(data, COPY)
    assert (stored.data, stored.is_copy) == (data, True)


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("RGB", "PNG"), ("RGB", "WEBP")])
def test_the_fidelity_profile_encodes_what_is_no_plain_jpeg(photo: Image.Image, mode: str, kind: str) -> None:
    stored = store(encoded(photo.convert(mode), kind), COPY)
    assert not stored.is_copy
    assert jpeg_frame(stored.data) == 0xC0


def test_a_jpeg_with_junk_between_its_markers_is_encoded_again(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG")
    stored = store(data[:20] + b"\0" * 5 + data[20:], COPY)
    assert not stored.is_copy
    assert stored.data == store(data, Encoding()).data


def test_an_image_larger_than_a_page_is_refused_and_one_copied_too_large_is_encoded(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG", quality=100, subsampling=0)
    small = len(store(data, Encoding()).data)
    assert not store(data, Encoding(None, 90, True, len(data) - 1)).is_copy
    with pytest.raises(BadImageError, match="more than a page"):
        store(data, Encoding(None, 90, True, small - 1))


def test_a_decompression_bomb_is_refused_unread(photo: Image.Image) -> None:
    png = encoded(photo, "PNG")
    bomb = png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]
    with pytest.raises(BadImageError, match=r"decompression bomb|not an image"):
        store(bomb, Encoding())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not found</html>",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(BadImageError, match=r"\w"):
        store(data, Encoding())


@given(st.binary(max_size=300), st.integers(0, 300))
def test_the_marker_walk_ends_on_any_bytes(junk: bytes, at: int) -> None:
    data = b"\xff\xd8" + junk
    assert jpeg_frame(data) is None or jpeg_frame(data) in range(0xC0, 0xD0)
    jpeg_frame(SMALL_JPEG[:at] + junk + SMALL_JPEG[at:])


SMALL_JPEG = encoded(Image.new("RGB", (9, 9)), "JPEG")


@pytest.mark.parametrize("setting", [{"max_size": 8}, {"max_size": 70_000}, {"quality": 0}, {"quality": 101}])
def test_settings_out_of_range_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(setting)).replace('_', '-')} must lie in"):
        Encoding(**setting)


def damaged_jpegs(count: int) -> dict[str, bytes]:
    """JPEGs of five kinds, each cut, with bits turned, with garbage put in, or with a part taken out."""
    rng = np.random.default_rng(5)
    kinds: list[dict[str, object]] = [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"restart_marker_blocks": 1},
        {"exif": b"Exif\0\0" + bytes(40)},
    ]
    sources = [
        encoded(
            Image.open(io.BytesIO(draw_jpeg(PLAN, Picture("val", label % len(CLASSES), label)))),
            "JPEG",
            **kinds[label % 5],
        )
        for label in range(20)
    ]
    return {f"{number:04d}.jpg": _damaged(sources[number % 20], rng, number // 20 % 4) for number in range(count)}


def _damaged(data: bytes, rng: np.random.Generator, how: int) -> bytes:
    at, length = int(rng.integers(0, len(data))), int(rng.integers(1, 40))
    if how == 0:
        return data[:at]
    if how == 1:
        turned = bytearray(data)
        for _ in range(rng.integers(1, 12)):
            turned[rng.integers(0, len(data))] ^= 1 << int(rng.integers(0, 8))
        return bytes(turned)
    if how == 2:
        return data[:at] + rng.bytes(length) + data[at + length * int(rng.integers(0, 2)) :]
    return data[:at] + data[at + length :]


@pytest.mark.parametrize("encoding", [Encoding(), COPY])
def test_hundreds_of_damaged_jpegs_end_as_pillow_judges_them(
    tmp_path: Path, listing_of: Callable[[dict[str, bytes]], Listing], encoding: Encoding
) -> None:
    contents = damaged_jpegs(400)
    sound, reasons = {}, {}
    for name, data in contents.items():
        try:
            sound[name] = decode_with_pillow(data)
        except BadImageError as error:
            reasons[name] = str(error)
    assert len(sound) > 50
    assert len(reasons) > 50
    out = tmp_path / "x.beton"
    convert(listing_of(contents), out, encoding=encoding, workers=2)
    assert sample_names(out) == list(sound)
    assert [row["name"] for row in read_rows(left_out_path(out), ("name", "reason"))] == list(reasons)
    for name, (_, stored) in zip(sound, read_samples(out), strict=True):
        pixels = sound[name] if encoding.max_size is None else shrink(sound[name], encoding.max_size)
        assert stored == encode_jpeg(pixels, 90) or (encoding.copy_jpeg and stored == contents[name])
