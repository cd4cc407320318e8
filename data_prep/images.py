"""One image: from the bytes of a file to the JPEG bytes that a .beton stores."""

import io
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3), blue first as OpenCV has it."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000")
"""What Pillow may take a file for. Not EPS or PDF, which would start other programs on a downloaded file."""
COPYABLE_FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive Huffman JPEG: what every decoder reads. Not arithmetic, not lossless."""
MAX_SIDE = 65_500
"""Longest side that libjpeg encodes (JPEG_MAX_DIMENSION)."""

_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # inside a scan: not a stuffed zero, a restart or a fill byte


class BadImageError(ValueError):
    """An image that cannot be stored; its text is the reason."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How pixels become stored bytes."""

    max_size: int | None = 500
    """Longest side in pixels; longer images are made smaller. None: as they are."""
    quality: int = 90
    copy_jpeg: bool = False
    """Keep the bytes of files that are sound RGB or grey JPEGs already."""
    max_bytes: int = 1 << 23

    def __post_init__(self) -> None:
        if self.max_size is not None and not 16 <= self.max_size <= MAX_SIDE:
            raise ValueError(f"--max-size must lie in 16 to {MAX_SIDE} pixels, got {self.max_size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must lie in 1 to 100, got {self.quality}")


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as it will lie in the .beton."""

    data: bytes
    width: int
    height: int
    is_copy: bool
    source_format: str
    """Such as JPEG/RGB or PNG/P; ends in /damaged where the decoder warned but Pillow still reads it."""


def store(data: bytes, encoding: Encoding) -> Stored:
    """Turn the bytes of an image file into those to store.

    raises: BadImageError with the reason
    """
    pixels, source_format, is_sound_jpeg = _decode(data)
    height, width = pixels.shape[:2]
    if encoding.copy_jpeg and is_sound_jpeg and len(data) <= encoding.max_bytes:
        return Stored(data, width, height, True, source_format)
    if encoding.max_size is not None:
        pixels = shrink(pixels, encoding.max_size)
    encoded = encode_jpeg(pixels, encoding.quality)
    if len(encoded) > encoding.max_bytes:
        raise BadImageError(f"takes {len(encoded)} bytes, more than a page of {encoding.max_bytes}; lower --max-size")
    height, width = pixels.shape[:2]
    return Stored(encoded, width, height, False, source_format)


def decode_with_pillow(data: bytes) -> Pixels:
    """Pixels by Pillow, the judge of what is an image. raises: BadImageError with the reason."""
    with _opened(data) as image:
        return _load(image)


def shrink(pixels: Pixels, max_size: int) -> Pixels:
    """Bound the longest side; rounding and filter are those of FFCV's RGBImageField, so that its pixels come out."""
    ratio = max_size / max(pixels.shape[:2])
    if ratio >= 1:
        return pixels
    height, width = (max(1, int(ratio * side)) for side in pixels.shape[:2])
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """JPEG with chroma halved (4:2:0). raises: BadImageError where the format cannot hold the image."""
    if max(pixels.shape[:2]) > MAX_SIDE:
        raise BadImageError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels; a JPEG holds {MAX_SIDE} a side")
    done, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise BadImageError("OpenCV could not encode it as JPEG")
    return encoded.tobytes()


def jpeg_frame(data: bytes) -> int | None:
    """Frame marker (0xC0 baseline, 0xC2 progressive ...) of a JPEG whose markers lead from start to end without a gap.

    None for anything else: junk between markers, a marker inside a scan, no end.
    """
    frame, at = None, 2
    while data[at : at + 1] == b"\xff":
        while data[at : at + 1] == b"\xff":
            at += 1
        marker = data[at] if at < len(data) else 0
        if marker == 0xD9:
            return frame
        length = int.from_bytes(data[at + 1 : at + 3], "big")
        if marker < 0xC0 or 0xD0 <= marker <= 0xD8 or length < 2:
            return None
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame is not None:
                return None
            frame = marker
        at += 1 + length
        if marker == 0xDA:
            found = _NEXT_MARKER.search(data, at)
            at = found.start() if found else len(data)
    return None


class WarningTap:
    """Catches what libjpeg prints to this process's standard error: its only way to say that data are damaged."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        os.dup2(self._file.fileno(), 2)

    def flowed(self) -> bool:
        """Whether anything was printed since the last call."""
        if os.lseek(2, 0, os.SEEK_END) == 0:
            return False
        os.lseek(2, 0, os.SEEK_SET)
        os.ftruncate(2, 0)
        return True


_tap: WarningTap | None = None


def tap_warnings() -> None:
    """Let this process notice libjpeg's warnings. For worker processes: their standard error is gone afterwards."""
    global _tap
    _tap = WarningTap()


def _decode(data: bytes) -> tuple[Pixels, str, bool]:
    """Pixels, source format, and whether it is a JPEG without any fault."""
    with _opened(data) as image:
        source_format = f"{image.format}/{image.mode}"
        if image.format != "JPEG" or image.mode not in ("RGB", "L"):
            return _load(image), source_format, False
        frame = jpeg_frame(data)
        fast, warned = _decode_with_opencv(data)
        # OpenCV gives the same pixels in less time (2.3 against 2.8 ms for ImageNet's files) and tells of damage, which
        # Pillow does not; but Pillow judges all that is not flawless.
        if frame in COPYABLE_FRAMES and fast is not None and not warned and fast.shape[1::-1] == image.size:
            return fast, source_format, True
        return _load(image), source_format + ("/damaged" if warned or fast is None else ""), False


def _decode_with_opencv(data: bytes) -> tuple[Pixels | None, bool]:
    if _tap is not None:
        _tap.flowed()
    try:
        pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        pixels = None
    return pixels, _tap is not None and _tap.flowed()


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opened(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF and large images are no fault; a bomb is an error below
            return Image.open(io.BytesIO(data), formats=_formats())
    except MemoryError:
        raise
    except Exception as error:  # Pillow lets nearly anything out of a damaged header
        raise BadImageError("is empty" if not data else _reason(error)) from error


def _load(image: Image.Image) -> Pixels:
    if max(image.size) > MAX_SIDE:
        raise BadImageError(f"{image.size[0]} x {image.size[1]} pixels; a JPEG holds {MAX_SIDE} a side")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return _to_pixels(image)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # as above, for damaged data
        raise BadImageError(_reason(error)) from error


def _to_pixels(image: Image.Image) -> Pixels:
    """Colours as torchvision's loader has them: no alpha, first frame, EXIF orientation ignored."""
    if image.mode in ("I", "F"):
        raise BadImageError(f"mode {image.mode} has no fixed range; save it with 8 or 16 bits a pixel")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 and give white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("<_io.BytesIO object", "<file")
    if text.startswith("cannot identify image file"):
        return "not an image that Pillow knows"
    return text[:200] or type(error).__name__
