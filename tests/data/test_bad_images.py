"""Damaged images: none crashes, none hangs, none goes unreported, and the policy decides what happens."""

import io
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.data.pictures import jpeg, picture, plain_params, write_beton
from trainer.data.kernel import JOB, LIB, STATUS, Colour, Kernel
from trainer.data.loader import DataError, ViewLoader
from trainer.data.views import View

VIEWS = [View(size=20, scale=(0.3, 1.0)), View(size=12, scale=(0.1, 0.3))]
WIDTH, HEIGHT = 80, 60
UNREADABLE, DAMAGED, COLOUR_SPACE, WRONG_SIZE = 1, 2, 3, 4


def status_of(
    *images: bytes, width: int = WIDTH, height: int = HEIGHT, mode: int = 0, colour: Colour = "exact"
) -> list[int]:
    """The kernel's verdict on each image, as a batch of the loader would get it."""
    kernel = Kernel(VIEWS, num_threads=2, colour=colour)
    buffers = [np.frombuffer(data or b"\0", np.uint8) for data in images]
    jobs = np.zeros((len(images), len(JOB)), np.int64)
    for row, buffer, data in zip(jobs, buffers, images, strict=True):
        row[:6] = buffer.ctypes.data, len(data), mode, width, height, 0
    out = np.empty(kernel.sample_bytes * len(images), np.uint8)
    LIB.views_batch(kernel.context, jobs.ctypes.data, len(images), out.ctypes.data)
    return [int(status) for status in jobs[:, JOB.index("status")]]


@pytest.fixture(scope="module")
def sound() -> bytes:
    return jpeg(picture(WIDTH, HEIGHT))


def test_every_kind_of_sound_jpeg_is_read(sound: bytes) -> None:
    pixels = picture(WIDTH, HEIGHT)
    kinds = [jpeg(pixels, progressive=True), jpeg(pixels, subsampling=0), jpeg(pixels, subsampling=2),
             jpeg(pixels, optimize=True), jpeg(pixels, restart_marker_blocks=3), jpeg(pixels[..., 0])]  # fmt: skip
    assert status_of(sound, *kinds) == [0] * 7


def test_a_grey_jpeg_becomes_grey_rgb() -> None:
    gray = picture(WIDTH, HEIGHT)[..., 0]
    params = plain_params(WIDTH, HEIGHT, (0, 0, HEIGHT, HEIGHT))
    view = Kernel([View(size=HEIGHT, scale=(0.1, 1.0))]).render(jpeg(gray), params, size=(WIDTH, HEIGHT))[0][0]
    with Image.open(io.BytesIO(jpeg(gray))) as image:
        assert (view == np.asarray(image.convert("RGB"))[:, :HEIGHT]).all()


def test_junk_anywhere_is_damage_for_it_may_have_been_a_table(sound: bytes) -> None:
    """Pillow passes over it in the header; data_prep encodes such files again."""
    tables = sound.index(b"\xff\xdb")
    assert status_of(sound[:tables] + b"junk" + sound[tables:]) == [DAMAGED]
    assert status_of(sound[:-100] + b"\xff\xd0" + sound[-100:]) == [DAMAGED]


def test_each_fault_has_its_own_name(sound: bytes) -> None:
    cmyk = io.BytesIO()
    Image.fromarray(picture(WIDTH, HEIGHT)).convert("CMYK").save(cmyk, "jpeg")
    assert status_of(b"", b"PNG", sound[:200]) == [UNREADABLE] * 3
    assert status_of(sound[: len(sound) // 2], sound[:-40]) == [DAMAGED] * 2
    assert status_of(cmyk.getvalue()) == [COLOUR_SPACE]
    assert status_of(sound, width=WIDTH + 1) == [WRONG_SIZE]
    assert status_of(b"\0" * 100, mode=1) == [WRONG_SIZE]
    assert status_of(sound, width=0) == [WRONG_SIZE]


def test_a_progressive_file_of_endless_scans_is_cut_short() -> None:
    """A decompression bomb: each repeated scan makes libjpeg go over the whole image again."""
    data = jpeg(picture(600, 600), progressive=True)
    last_scan = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[last_scan:-2] * 20_000 + data[-2:]
    begin = time.monotonic()
    assert status_of(bomb, width=600, height=600) == [UNREADABLE]
    assert time.monotonic() - begin < 20


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Flips, zeroes, drops or inserts bytes, or cuts the end off."""
    broken, place = bytearray(data), int(rng.integers(2, len(data) - 2))
    kind, length = rng.integers(5), int(rng.integers(1, 60))
    if kind == 0:
        for i in rng.integers(2, len(data), 4):
            broken[i] ^= int(rng.integers(1, 256))
    elif kind == 1:
        broken[place : place + length] = bytes(min(length, len(data) - place))
    elif kind == 2:
        del broken[place : place + length]
    elif kind == 3:
        broken[place:place] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
    else:
        del broken[place:]
    return bytes(broken)


def pil_refuses(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.size != (WIDTH, HEIGHT) or image.mode not in ("RGB", "L")
    except Exception:  # Pillow raises nearly anything on damage, and this is the oracle
        return True


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("colour", ["exact", "linear"])
@pytest.mark.parametrize("progressive", [False, True])
def test_hundreds_of_damaged_jpegs_neither_crash_nor_go_unreported(progressive: bool, colour: Colour) -> None:
    rng = np.random.default_rng(progressive)
    data = jpeg(picture(WIDTH, HEIGHT), progressive=progressive)
    broken = [damage(data, rng) for _ in range(400)]
    verdicts = status_of(*broken, colour=colour)
    unreported = [i for i, image in enumerate(broken) if verdicts[i] == 0 and pil_refuses(image)]
    assert unreported == []
    assert np.mean(verdicts) > 0.5  # some flips only make another picture, which nobody can tell
    cut = [data[:length] for length in range(0, len(data) - 2, 7)]
    assert 0 not in status_of(*cut, colour=colour)
    assert status_of(data, colour=colour) == [0]


@pytest.fixture(scope="module")
def partly_bad(tmp_path_factory: pytest.TempPathFactory, sound: bytes) -> Path:
    """12 samples, of which 2 and 7 are broken."""
    images = [jpeg(picture(WIDTH, HEIGHT, seed)) for seed in range(12)]
    images[2], images[7] = sound[: len(sound) // 2], b"not a jpeg"
    return write_beton(tmp_path_factory.mktemp("bad") / "bad.beton", images, [(WIDTH, HEIGHT)] * 12)


def test_under_fail_the_message_names_the_file_the_fault_and_the_way_out(partly_bad: Path) -> None:
    loader = ViewLoader(partly_bad, VIEWS, batch_size=6, shuffle=False)
    with pytest.raises(DataError, match=rf"sample 2 \(class/2.jpg\): {STATUS[DAMAGED]}.*on_bad_image"):
        next(loader.epoch(0))
    loader.close()


def test_under_replace_another_sample_of_the_batch_takes_the_whole_place(
    partly_bad: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = ViewLoader(partly_bad, VIEWS, batch_size=6, shuffle=False, on_bad_image="replace")

    def batches(epoch: int) -> list[tuple[list[int], list[int], int, NDArray[np.uint8]]]:
        return [(b.sample_ids.tolist(), b.labels.tolist(), b.num_bad, b.views[0][0].numpy().copy())
                for b in loader.epoch(epoch)]  # fmt: skip

    with caplog.at_level(logging.WARNING):
        (ids, labels, num_bad, views), (ids_2, _, num_bad_2, _) = batches(0)
        batches(1)
    loader.close()
    assert (ids, ids_2) == ([0, 1, 3, 3, 4, 5], [6, 8, 8, 9, 10, 11])
    assert labels == [10 * i for i in ids]
    assert (num_bad, num_bad_2) == (1, 1)
    assert (views[2] == views[3]).all()
    assert (views[2] != views[1]).any()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # once a file, not once an epoch
    assert "class/2.jpg" in messages[0]
    assert STATUS[UNREADABLE] in messages[1]


def test_a_batch_without_one_good_image_fails_even_under_replace(partly_bad: Path) -> None:
    loader = ViewLoader(partly_bad, VIEWS, batch_size=2, subset=[2, 7], on_bad_image="replace")
    with pytest.raises(DataError, match="not one of the 2 images"):
        next(loader.epoch(0))
    loader.close()
