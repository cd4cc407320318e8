"""Strange and broken files from the wild: every one is stored or named, as Pillow has it."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.schema import LEFT_OUT_COLUMNS, left_out_path, read_rows, read_samples, sample_names

ODD = Path(__file__).parents[2].parent / "shared" / "data" / "odd_images"


@pytest.mark.shared
@pytest.mark.skipif(not ODD.is_dir(), reason="needs ../shared/data/odd_images beside the checkout")
@pytest.mark.parametrize("profile", [("--max-size", 500), ("--copy-jpeg",)])
def test_every_odd_file_is_converted_or_named(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], profile: tuple[object, ...]
) -> None:
    with (ODD / "manifest.tsv").open() as file:
        decodes = {row["file"]: row["pil_decode"] == "ok" for row in csv.DictReader(file, delimiter="\t")}
    out = tmp_path / "odd.beton"
    code, text, _ = run("convert", ODD, out, *profile, "--workers", 2)
    assert code == 0
    assert set(sample_names(out)) == {name for name, good in decodes.items() if good}
    left_out = {row["name"]: row["reason"] for row in read_rows(left_out_path(out), LEFT_OUT_COLUMNS)}
    assert set(left_out) == {name for name, good in decodes.items() if not good}
    assert all(left_out.values())
    assert f"{len(left_out)} left out" in text
    assert run("verify", out, "--workers", 1)[0] == 0
    if "--copy-jpeg" in profile:
        stored = dict(zip(sample_names(out), read_samples(out), strict=True))
        for name in ("hopper.jpg", "hopper_gray.jpg", "progressive.JPEG", "hopper_orientation_6.jpg"):
            assert stored[name][1] == (ODD / name).read_bytes()
