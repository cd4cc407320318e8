"""The kernel compiled for another processor must give the same bytes, whichever machine code was chosen here."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.data.pictures import jpeg, picture
from trainer.data import kernel
from trainer.data.views import CenterView, View

SOURCE = Path(kernel.__file__).parent / "csrc" / "views.c"
VIEWS = [
    View(size=45, scale=(0.1, 1.0), solarize_prob=0.3, jitter_prob=1.0, blur_prob=0.8),
    CenterView(size=24, resize=32),
    View(size=5, scale=(0.8, 1.0)),  # more taps than are unrolled
]


def flags_of_setup() -> list[str]:
    """setup.py's own flags, so that this test builds what users build."""
    text = Path("setup.py").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("FLAGS"))
    return list(eval(line.split("=", 1)[1]))


def make_views(lib: ctypes.CDLL, resize: kernel.Resize, colour: kernel.Colour) -> NDArray[np.uint8]:
    """The views of 40 images of three kinds of chroma, made by `lib`."""
    images = [np.frombuffer(jpeg(picture(90 + i, 70, seed=i), subsampling=i % 3), np.uint8) for i in range(40)]
    jobs = np.array([[b.ctypes.data, b.nbytes, 0, 90 + i, 70, i, 9] for i, b in enumerate(images)], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "LIB", lib)
        context = kernel.Kernel(VIEWS, seed=3, resize=resize, colour=colour)
        out = np.empty(context.sample_bytes * len(images), np.uint8)
        lib.views_batch(context.context, jobs.ctypes.data, len(images), out.ctypes.data)
        context.close()
    assert not jobs[:, 6].any()
    return out


def runs_here(option: str) -> bool:
    cpu = Path("/proc/cpuinfo")
    return option != "-mavx2" or (cpu.exists() and " avx2" in cpu.read_text(encoding="utf-8"))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a compiler")
@pytest.mark.parametrize("option", ["-O2", "-mavx2"])
def test_another_build_gives_the_same_bytes(tmp_path: Path, option: str) -> None:
    if not runs_here(option):
        pytest.skip("this processor has no AVX2")
    path = tmp_path / "portable.so"
    command = [
        "gcc",
        "-O3",
        "-std=gnu11",
        "-shared",
        "-fPIC",
        "-pthread",
        "-DVIEWS_PORTABLE",
        option,
        *flags_of_setup(),
    ]
    subprocess.run([*command, str(SOURCE), "-o", str(path), "-ljpeg", "-lm"], check=True, stderr=sys.stderr)
    portable = kernel._checked(ctypes.CDLL(str(path)))
    modes: list[tuple[kernel.Resize, kernel.Colour]] = [
        ("bicubic", "exact"),
        ("bicubic", "linear"),
        ("triangle", "linear"),
    ]
    for resize, colour in modes:
        assert (make_views(portable, resize, colour) == make_views(kernel.LIB, resize, colour)).all()
