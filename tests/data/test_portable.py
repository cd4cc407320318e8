"""The kernel compiled without its AVX2 half, as for another processor, must give the same bytes."""

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
]


def flags_of_setup() -> list[str]:
    """setup.py's own flags, so that this test builds what users build."""
    text = Path("setup.py").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("FLAGS"))
    return list(eval(line.split("=", 1)[1]))


def make_views(lib: ctypes.CDLL, colour: kernel.Colour) -> NDArray[np.uint8]:
    """The views of 40 images, made by `lib`."""
    images = [np.frombuffer(jpeg(picture(90 + i, 70, seed=i)), np.uint8) for i in range(40)]
    jobs = np.array([[b.ctypes.data, b.nbytes, 0, 90 + i, 70, i, 9] for i, b in enumerate(images)], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "LIB", lib)
        context = kernel.Kernel(VIEWS, seed=3, colour=colour)
        out = np.empty(context.sample_bytes * len(images), np.uint8)
        lib.views_batch(context.context, jobs.ctypes.data, len(images), out.ctypes.data)
        context.close()
    assert not jobs[:, 6].any()
    return out


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a compiler")
def test_the_portable_build_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "portable.so"
    command = ["gcc", "-O2", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-DVIEWS_PORTABLE", *flags_of_setup()]
    subprocess.run([*command, str(SOURCE), "-o", str(path), "-ljpeg", "-lm"], check=True, stderr=sys.stderr)
    portable = kernel._checked(ctypes.CDLL(str(path)))
    for colour in ("exact", "linear"):
        assert (make_views(portable, colour) == make_views(kernel.LIB, colour)).all()
