"""A conversion gives the same file every time, all of it or nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from data_prep.convert import ConvertError, convert
from data_prep.images import Encoding
from data_prep.pool import WorkerDiedError
from data_prep.schema import (
    BetonError,
    file_sha256,
    manifest_path,
    open_beton,
    read_labels,
    read_manifest,
    read_samples,
    sample_names,
)
from data_prep.sources import FolderReader, Item, Listing, list_source

Run = Callable[..., tuple[int, str, str]]
SMALL = Encoding(max_size=64)


@dataclass(frozen=True)
class DeadlyReader:
    """Kills the process that reads one certain image, as the kernel does when memory runs out."""

    reader: FolderReader
    deadly: str

    def read(self, item: Item) -> bytes:
        if item.name == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.reader.read(item)


def test_the_file_is_the_same_whatever_the_number_of_workers(images: Path, converted: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        out = tmp_path / f"{workers}.beton"
        convert(list_source(images), out, encoding=SMALL, workers=workers)
        assert out.read_bytes() == converted.read_bytes()
        assert manifest_path(out).read_text() == manifest_path(converted).read_text()


def test_the_manifest_tells_what_was_done(images: Path, converted: Path) -> None:
    manifest, info = read_manifest(converted), open_beton(converted)
    assert manifest is not None
    assert manifest.classes == info.classes == sorted(folder.name for folder in images.iterdir())
    assert (manifest.num_samples, manifest.num_reencoded, manifest.num_copied, manifest.num_left_out) == (18, 18, 0, 0)
    assert (manifest.beton_sha256, manifest.beton_bytes) == (file_sha256(converted), converted.stat().st_size)
    assert (manifest.profile, manifest.labelled, manifest.source) == ("speed", True, "shapes")
    assert str(images.parent) not in manifest.to_json()
    assert sample_names(converted) == [item.name for item in list_source(images).items]
    assert read_labels(converted).tolist() == [item.label for item in list_source(images).items]


def test_the_fidelity_profile_gives_the_source_bytes_back(images: Path, tmp_path: Path, run: Run) -> None:
    code, out, _ = run("convert", images, tmp_path / "x.beton", "--copy-jpeg", "--workers", 1)
    assert code == 0
    assert "0 encoded again, 18 copied" in out
    for (_, data), name in zip(read_samples(tmp_path / "x.beton"), sample_names(tmp_path / "x.beton"), strict=True):
        assert data == (images / name).read_bytes()


def test_a_killed_worker_ends_the_conversion_at_once_and_leaves_nothing(images: Path, tmp_path: Path) -> None:
    listing = list_source(images)
    deadly = replace(listing, reader=DeadlyReader(FolderReader(images), listing.items[-1].name))
    started = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"worker process was killed.*fewer --workers"):
        convert(deadly, tmp_path / "x.beton", encoding=SMALL, workers=2)
    assert time.monotonic() - started < 50
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_conversion_and_leaves_nothing(images: Path, tmp_path: Path, number: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for copy in range(3000):
        os.link(next(images.glob("*/*.jpg")), source / f"{copy}.jpg")
    out = tmp_path / "out" / "x.beton"
    command = [sys.executable, "-m", "data_prep", "convert", source, out, "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=signals_as_in_a_terminal
    ) as process:
        _stop_once_begun(process.pid, out, number)
        _, error = process.communicate(timeout=200)
    assert process.returncode == 128 + number
    assert error.splitlines()[-1] == "data_prep convert: stopped; nothing was written"
    assert "Traceback" not in error
    assert list(out.parent.iterdir()) == []


def signals_as_in_a_terminal() -> None:
    """A test run in the background, or under nohup, hands on that these are ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _stop_once_begun(pid: int, out: Path, number: int) -> None:
    for _ in range(6000):
        if list(out.parent.glob(out.name + ".tmp-*")):
            return os.kill(pid, number)
        time.sleep(0.005)


WORKERS_THAT_WAIT = """
import os, time
from data_prep.pool import ordered_map

def start(): pass

def wait_and_tell(seconds):
    time.sleep(seconds)
    return os.getpid()

if __name__ == "__main__":
    for pid in ordered_map(wait_and_tell, [0, 60, 60], workers=2, preload="data_prep.pool", start=start):
        print(pid, flush=True)
"""


class SlowReader:
    """Takes a minute an image."""

    def read(self, item: Item) -> bytes:
        time.sleep(60)
        return b""


def test_a_stopped_conversion_does_not_wait_for_the_images_in_hand(
    images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    started = time.monotonic()
    stopper = threading.Thread(target=_stop_once_begun, args=(os.getpid(), tmp_path / "x.beton", signal.SIGINT))
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        convert(replace(list_source(images), reader=SlowReader()), tmp_path / "x.beton", encoding=SMALL, workers=2)
    stopper.join()
    assert time.monotonic() - started < 45
    assert list(tmp_path.iterdir()) == []


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(WORKERS_THAT_WAIT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent by 10 s")


BAD = {"cut.jpg": b"\xff\xd8\xff\xe0\x00", "empty.jpg": b"", "text.jpg": b"not an image"}


@pytest.fixture
def with_bad(images: Path, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    shutil.copytree(images, source)
    for name, data in BAD.items():
        (next(source.iterdir()) / name).write_bytes(data)
    return source


def test_unreadable_images_are_left_out_and_named(with_bad: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "x.beton"
    code, text, _ = run("convert", with_bad, out)
    assert code == 0
    assert "18 images of 3 classes" in text
    assert "3 left out" in text
    listed = (tmp_path / "x.beton.left_out.tsv").read_text()
    assert all(name in text and name in listed for name in BAD)
    assert run("verify", out)[0] == 0
    assert len(sample_names(out)) == 18


def test_on_bad_fail_stops_at_the_first_unreadable_image(with_bad: Path, tmp_path: Path, run: Run) -> None:
    code, _, error = run("convert", with_bad, tmp_path / "x.beton", "--on-bad", "fail")
    assert code == 2
    assert "cut.jpg" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_without_one_readable_image_is_an_error(tmp_path: Path, listing_of: Callable[..., Listing]) -> None:
    with pytest.raises(ConvertError, match="none of its 3 images can be read"):
        convert(listing_of(BAD), tmp_path / "x.beton", encoding=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_same_conversion_twice_is_up_to_date_and_another_is_refused(
    with_bad: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "x.beton"
    assert run("convert", with_bad, out)[0] == 0
    before = out.stat().st_mtime_ns
    assert "up to date" in run("convert", with_bad, out, "--workers", 1)[1]
    code, _, error = run("convert", with_bad, out, "--quality", 80)
    assert code == 2
    assert "quality 90 then, 80 now" in error
    for name in BAD:
        next(with_bad.glob(f"*/{name}")).unlink()
    assert "other images" in run("convert", with_bad, out)[2]
    assert out.stat().st_mtime_ns == before
    assert run("convert", with_bad, out, "--overwrite")[0] == 0
    assert not (tmp_path / "x.beton.left_out.tsv").exists()


def test_a_damaged_or_foreign_file_is_not_up_to_date(images: Path, converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.beton"
    shutil.copy(converted, out)
    with pytest.raises(ConvertError, match="no manifest says"):
        convert(list_source(images), out, encoding=SMALL)
    shutil.copy(manifest_path(converted), manifest_path(out))
    with out.open("r+b") as file:
        file.seek(1 << 23)
        file.write(b"\0")
    with pytest.raises(BetonError, match="damaged; give --overwrite"):
        convert(list_source(images), out, encoding=SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99, this code reads 1"),
        ({"num_samples": 5}, "do not belong together"),
        ({"classes": ...}, "has no classes"),
        (None, "not a manifest"),
    ],
)
def test_a_wrong_manifest_is_refused(
    converted: Path, tmp_path: Path, change: dict[str, object] | None, message: str
) -> None:
    out = tmp_path / "x.beton"
    shutil.copy(converted, out)
    known = {**json.loads(manifest_path(converted).read_text()), **(change or {})}
    kept = {key: value for key, value in known.items() if value is not ...}
    manifest_path(out).write_text("{" if change is None else json.dumps(kept))
    with pytest.raises(BetonError, match=message):
        open_beton(out)


def test_a_split_and_a_subset_are_taken(images: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(images, tmp_path / "all" / "train")
    names = [path.relative_to(images).as_posix() for path in sorted(images.glob("*/[23].jpg"))]
    (tmp_path / "list.txt").write_text("\n".join(names))
    out = tmp_path / "x.beton"
    assert run("convert", tmp_path / "all", out, "--split", "train", "--subset", tmp_path / "list.txt")[0] == 0
    assert sample_names(out) == names
    assert read_labels(out).tolist() == [0, 0, 1, 1, 2, 2]
    code, _, error = run("convert", tmp_path / "all", out, "--split", "val")
    assert (code, "its folders: train" in error) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--copy-jpeg", "--max-size", 300], "give one of the two"),
        (["--page-size", 3], "power of two"),
        (["--workers", 0], "--workers must be 1 or more"),
        (["--quality", 0], "--quality must lie in"),
    ],
)
def test_contradictory_arguments_are_refused(
    images: Path, tmp_path: Path, run: Run, arguments: list[object], message: str
) -> None:
    code, _, error = run("convert", images, tmp_path / "x.beton", *arguments)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert message in error


def test_the_command_line_reports_a_users_mistake_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "convert", tmp_path / "none", tmp_path / "x.beton"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no such folder" in done.stderr
