"""The compiled view kernel (csrc/views.c) as Python sees it: memory layouts, parameters, single images."""

import ctypes
import weakref
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.data.views import CenterView, View

Resize = Literal["bicubic", "triangle"]
Colour = Literal["exact", "linear"]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Places in PARAMS["factor"], and the numbers in PARAMS["order"]."""

STATUS = {
    1: "the bytes are not a JPEG that libjpeg can read",
    2: "the JPEG is damaged or cut off",
    3: "the JPEG is CMYK; convert it to RGB",
    4: "the stored image has another size than the file's index says",
    5: "there was not enough memory for it",
}
"""Why a sample could not be viewed; 0 is success."""

_RECIPE = np.dtype(
    [("seed", "u8"), ("epoch", "i8"), ("num_views", "i4"), ("filter", "i4"), ("colour", "i4"), ("geometry_only", "i4")]
)
_VIEW = np.dtype([
    ("size", "i4"), ("resize", "i4"), ("offset", "i8"), ("index", "i8"), ("scale", "f8", 2), ("ratio", "f8", 2),
    ("flip_prob", "f8"), ("jitter_prob", "f8"), ("strength", "f8", 4), ("gray_prob", "f8"), ("blur_prob", "f8"),
    ("blur_sigma", "f8", 2), ("solarize_prob", "f8"),
])  # fmt: skip
PARAMS = np.dtype([
    ("box", "f8", 4), ("limit", "i4", 4), ("flip", "i4"), ("jitter", "i4"), ("gray", "i4"), ("solarize", "i4"),
    ("order", "i4", 4), ("factor", "f4", 4), ("sigma", "f4"), ("reserved", "i4"),
])  # fmt: skip
"""What was drawn for one view: box and limit are left, top, right, bottom in source pixels; sigma 0 is no blur."""
JOB = ("address", "size", "mode", "width", "height", "sample_id", "status")
"""Columns of a batch's int64 table of jobs."""


def view_runs(views: Sequence[View | CenterView]) -> list[tuple[int, int]]:
    """(number of views, size) of each run of consecutive views of one size."""
    return [(len(list(run)), size) for size, run in groupby(view.size for view in views)]


def _load() -> ctypes.CDLL:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        if (path := folder / f"_views{suffix}").exists():
            return _checked(ctypes.CDLL(str(path)))
    raise ImportError(f"the view kernel is not built in {folder}; run: python setup.py build_ext --inplace")


def _checked(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the functions and refuses a library built from other sources than this file expects."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.views_open.argtypes, lib.views_open.restype = [pointer, pointer, ctypes.c_int], pointer
    lib.views_close.argtypes, lib.views_close.restype = [pointer], None
    lib.views_set_epoch.argtypes, lib.views_set_epoch.restype = [pointer, integer], None
    lib.views_draw.argtypes, lib.views_draw.restype = [pointer, pointer, integer, pointer], None
    lib.views_batch.argtypes, lib.views_batch.restype = [pointer, pointer, integer, pointer], None
    lib.views_render.argtypes, lib.views_render.restype = [pointer, pointer, pointer, pointer], ctypes.c_int
    lib.views_philox.argtypes, lib.views_philox.restype = [pointer, ctypes.c_uint64, pointer], None
    lib.views_sizes.argtypes, lib.views_sizes.restype = [pointer], None
    sizes = np.zeros(4, np.int64)
    lib.views_sizes(sizes.ctypes.data)
    expected = [_RECIPE.itemsize, _VIEW.itemsize, PARAMS.itemsize, 8 * len(JOB)]
    if sizes.tolist() != expected:
        raise ImportError("the view kernel is older than its sources; run: python setup.py build_ext --inplace --force")
    return lib


LIB = _load()


def _view_table(views: Sequence[View | CenterView]) -> NDArray[np.void]:
    table, offset, row = np.zeros(len(views), _VIEW), 0, 0
    for count, size in view_runs(views):
        for index in range(count):
            table[row]["size"], table[row]["offset"], table[row]["index"] = size, offset, index
            _fill(table[row], views[row])
            row += 1
        offset += count * 3 * size * size
    return table


def _fill(row: Any, view: View | CenterView) -> None:
    if isinstance(view, CenterView):
        row["resize"] = view.resize
        return
    row["strength"] = view.brightness, view.contrast, view.saturation, view.hue
    for name in ("scale", "ratio", "flip_prob", "jitter_prob", "gray_prob", "blur_prob", "blur_sigma", "solarize_prob"):
        row[name] = getattr(view, name)


class Kernel:
    """One recipe of views, ready to run; not for two threads at once.

    raises: MemoryError
    """

    def __init__(
        self,
        views: Sequence[View | CenterView],
        *,
        seed: int = 0,
        num_threads: int = 1,
        resize: Resize = "bicubic",
        colour: Colour = "exact",
        geometry_only: bool = False,
    ) -> None:
        self.runs = view_runs(views)
        self.num_views = len(views)
        self.sample_bytes = sum(count * 3 * size * size for count, size in self.runs)
        recipe, table = np.zeros(1, _RECIPE), _view_table(views)
        filter_, colour_ = ("triangle", "bicubic").index(resize), ("exact", "linear").index(colour)
        recipe[0] = (seed, 0, len(views), filter_, colour_, geometry_only)
        self._context: int | None = LIB.views_open(recipe.ctypes.data, table.ctypes.data, num_threads)
        if not self._context:
            raise MemoryError("no memory for the view kernel")
        self._free = weakref.finalize(self, LIB.views_close, self._context)
        self._free.atexit = False  # a thread that is still making a batch may be using it

    @property
    def context(self) -> int:
        """The C side's address. raises: ValueError once closed"""
        if not self._context:
            raise ValueError("this loader or kernel is closed; make a new one")
        return self._context

    def close(self) -> None:
        """Frees the scratch memory; the kernel cannot be used afterwards. May be called twice."""
        self._context = None
        self._free()

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose parameters later calls draw; not while a batch is being made."""
        LIB.views_set_epoch(self.context, epoch)

    def draw(self, sample_ids: ArrayLike, widths: ArrayLike, heights: ArrayLike) -> NDArray[np.void]:
        """The parameters of every view of these samples, (num_views, B) of PARAMS."""
        jobs = np.zeros((np.size(sample_ids), len(JOB)), np.int64)
        for name, values in (("sample_id", sample_ids), ("width", widths), ("height", heights)):
            jobs[:, JOB.index(name)] = values
        params = np.zeros((self.num_views, len(jobs)), PARAMS)
        LIB.views_draw(self.context, jobs.ctypes.data, len(jobs), params.ctypes.data)
        return params

    def render(
        self, image: bytes | NDArray[np.uint8], params: NDArray[np.void], *, size: tuple[int, int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """The views of one image with these parameters, one (V, S, S, 3) array a run of equal-size views.

        image: JPEG bytes, with `size` its (width, height), or (H, W, 3) pixels
        params: (num_views,) of PARAMS
        raises: ValueError if the image cannot be decoded
        """
        raw = not isinstance(image, bytes)
        pixels = np.ascontiguousarray(image) if raw else np.frombuffer(image, np.uint8)
        width, height = (pixels.shape[1], pixels.shape[0]) if raw else (size or (0, 0))
        jobs = np.array([[pixels.ctypes.data, pixels.nbytes, raw, width, height, 0, 0]], np.int64)
        params, out = np.ascontiguousarray(params), np.empty(self.sample_bytes, np.uint8)
        assert (params.dtype, params.shape) == (PARAMS, (self.num_views,))
        status = LIB.views_render(self.context, jobs.ctypes.data, params.ctypes.data, out.ctypes.data)
        if status:
            raise ValueError(STATUS[status])
        return self.split(out, 1)

    def split(self, out: NDArray[np.uint8], count: int) -> list[NDArray[np.uint8]]:
        """Cuts the flat bytes of `count` samples into runs; (V * count, S, S, 3) each, view-major, no copy."""
        flat, parts = out.reshape(-1), []
        for number, size in self.runs:
            length = number * count * 3 * size * size
            parts.append(flat[:length].reshape(number * count, size, size, 3))
            flat = flat[length:]
        return parts
