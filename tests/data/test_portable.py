"""The kernel compiled for another processor must give the same bytes, whichever machine code was chosen here."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.data.pictures import jpeg, picture
from trainer.data import kernel
from trainer.data.views import CenterView, View

SOURCE = Path(kernel.__file__).parent / "csrc" / "views.c"
SIZE = (62, 45)
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


def make_views(
    lib: ctypes.CDLL, images: list[bytes], size: tuple[int, int], resize: kernel.Resize, colour: kernel.Colour
) -> tuple[NDArray[np.uint8], list[int]]:
    """(B, bytes) of the views of each image and its status, made by `lib`; images may claim the size that they like."""
    buffers = [np.frombuffer(data, np.uint8) for data in images]
    jobs = np.array([[b.ctypes.data, b.nbytes, 0, *size, i, 9] for i, b in enumerate(buffers)], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "LIB", lib)
        context = kernel.Kernel(VIEWS, seed=3, resize=resize, colour=colour)
        out = np.zeros((len(images), context.sample_bytes), np.uint8)
        for row, job in zip(out, jobs, strict=True):
            lib.views_batch(context.context, job.ctypes.data, 1, row.ctypes.data)
        context.close()
    return out, [int(status) for status in jobs[:, 6]]


def runs_here(option: str) -> bool:
    cpu = Path("/proc/cpuinfo")
    return option != "-mavx2" or (cpu.exists() and " avx2" in cpu.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["-O2", "-mavx2"])
def portable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel without machine code of its own choice, and with libjpeg's entropy decoder."""
    if shutil.which("gcc") is None:
        pytest.skip("needs a compiler")
    if not runs_here(request.param):
        pytest.skip("this processor has no AVX2")
    path = tmp_path_factory.mktemp("kernel") / "portable.so"
    options = [
        "-O3",
        "-std=gnu11",
        "-shared",
        "-fPIC",
        "-pthread",
        "-DVIEWS_PORTABLE",
        request.param,
        *flags_of_setup(),
    ]
    subprocess.run(["gcc", *options, str(SOURCE), "-o", str(path), "-ljpeg", "-lm"], check=True, stderr=sys.stderr)
    return kernel._checked(ctypes.CDLL(str(path)))


@pytest.mark.parametrize(("resize", "colour"), [("bicubic", "exact"), ("bicubic", "linear"), ("triangle", "linear")])
def test_another_build_gives_the_same_bytes(
    portable: ctypes.CDLL, resize: kernel.Resize, colour: kernel.Colour
) -> None:
    for i in range(40):
        image = [jpeg(picture(90 + i, 70, seed=i), subsampling=i % 3)]
        theirs, ours = (make_views(lib, image, (90 + i, 70), resize, colour) for lib in (portable, kernel.LIB))
        assert theirs[1] == ours[1] == [0]
        assert (theirs[0] == ours[0]).all()


@pytest.mark.parametrize("colour", ["exact", "linear"])
def test_our_entropy_decoder_reads_every_file_sound_or_damaged_as_libjpegs_does(
    portable: ctypes.CDLL, colour: kernel.Colour
) -> None:
    images = list(all_kinds(np.random.default_rng(0)))
    theirs, ours = (make_views(lib, images, SIZE, "triangle", colour) for lib in (portable, kernel.LIB))
    assert ours[1] == theirs[1]
    assert {0, 2} <= set(ours[1]), "sound and damaged ones"
    assert (ours[0] == theirs[0]).all()


def all_kinds(rng: np.random.Generator) -> Iterator[bytes]:
    """Files of every quality with own and common tables, whole, with changed bytes, with other ends."""
    noise = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)  # long codes and full blocks
    for number in range(120):
        pixels = picture(*SIZE, seed=number) if number % 3 else noise
        kind = {"restart_marker_blocks": 3} if number % 10 == 0 else {"progressive": number % 10 == 1}
        whole = jpeg(
            pixels[..., 0] if number % 8 == 0 else pixels, quality=int(rng.choice([3, 30, 75, 92, 100])),
            optimize=bool(number % 2), **({} if number % 8 == 0 else {"subsampling": number % 3}), **kind,
        )  # fmt: skip
        yield whole
        for end in (b"", b"\xff", b"\x00\xff\xd9", b"\xff\xff\xd9", b"abcdefghij\xff\xd9", b"\xff\xd0\xff\xd9"):
            yield whole[:-2] + end
        for _ in range(4):
            changed = bytearray(whole)
            for place in rng.integers(len(whole) // 2, len(whole), int(rng.integers(1, 4))):
                changed[place] = int(rng.choice([0, 255, int(rng.integers(256))]))
            yield bytes(changed)
        yield whole[: int(rng.integers(len(whole) // 2, len(whole)))]
