"""Damage is found wherever it lies; what is sound is called sound."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.beton import read_layout
from data_prep.schema import file_sha256, left_out_path, manifest_path, samples_path

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    """A sound .beton with its companions, to damage."""
    out = tmp_path / converted.name
    for of in (Path, manifest_path, samples_path):
        shutil.copy(of(converted), of(out))
    assert not left_out_path(converted).exists()
    return out


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_a_sound_file_passes(copied: Path, run: Run) -> None:
    code, out, _ = run("verify", copied, "--workers", 2)
    assert (code, "18 samples, 18 decoded, manifest and checksums agree" in out) == (0, True)
    assert "6 decoded" in run("verify", copied, "--every", 3, "--workers", 1)[1]


def test_one_turned_bit_in_an_image_is_found_and_the_sample_named(copied: Path, run: Run) -> None:
    at = int(read_layout(copied).image["data_ptr"][4]) + 300
    overwrite(copied, at, bytes([copied.read_bytes()[at] ^ 1]))
    code, _, error = run("verify", copied, "--workers", 1)
    assert code == 1
    assert "sha256 is not that of its manifest" in error
    assert "sample 4: its bytes are not those that were written" in error


def test_damage_that_breaks_an_image_is_found_without_a_manifest_too(copied: Path, run: Run) -> None:
    manifest_path(copied).unlink()
    overwrite(copied, int(read_layout(copied).image["data_ptr"][4]), bytes(64))
    code, _, error = run("verify", copied, "--workers", 1)
    assert code == 1
    assert "sample 4: does not decode" in error


def test_changed_labels_are_found(copied: Path, run: Run) -> None:
    text = samples_path(copied).read_text()
    samples_path(copied).write_text(text.replace("\n0\t0\t", "\n0\t2\t"))
    code, _, error = run("verify", copied, "--workers", 1)
    assert (code, "1 samples (first: 0) have another label" in error) == (1, True)


def test_a_shortened_sample_list_is_found(copied: Path, run: Run) -> None:
    lines = samples_path(copied).read_text().splitlines(keepends=True)
    samples_path(copied).write_text("".join(lines[:-1]))
    code, _, error = run("verify", copied, "--workers", 1)
    assert (code, "lists 17 samples, the file has 18" in error) == (1, True)


def test_a_size_that_the_table_has_wrong_is_found(copied: Path, run: Run) -> None:
    manifest_path(copied).unlink()
    row = read_layout(copied).image[0].copy()
    at = copied.read_bytes().index(row.tobytes())
    row["height"] += 1
    overwrite(copied, at, row.tobytes())
    code, _, error = run("verify", copied, "--workers", 1)
    assert (code, "the table says" in error) == (1, True)


@pytest.mark.parametrize("kind", ["jpg", "raw"])
def test_files_of_ffcvs_own_writer_pass_and_are_described(
    written_by_ffcv: dict[str, Path], run: Run, kind: str
) -> None:
    path = written_by_ffcv[kind]
    before = file_sha256(path)
    code, out, _ = run("verify", path, "--workers", 1)
    assert (code, "18 decoded, no manifest to compare with" in out) == (0, True)
    code, out, _ = run("info", path)
    assert code == 0
    assert f"{'18 JPEG, 0' if kind == 'jpg' else '0 JPEG, 18'} raw pixels" in out
    assert file_sha256(path) == before


def test_info_shows_classes_counts_and_profile(converted: Path, run: Run) -> None:
    code, out, _ = run("info", converted)
    assert code == 0
    for part in ("3: brick_square, checked_star, dotted_heart", "5 to 7", "speed", "max_size 64", "18 JPEG"):
        assert part in out


def test_what_is_no_beton_is_one_clear_message(tmp_path: Path, run: Run) -> None:
    code, out, error = run("verify", tmp_path / "none.beton")
    assert (code, out, error.count("\n")) == (1, "", 1)
    assert "no such file" in error
