"""A list of names or ids stands for exactly the samples that it names."""

from pathlib import Path

import pytest

from data_prep.schema import BetonError, sample_names
from trainer.data.subset import read_subset


def listing(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "some.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_names_paths_and_ids_mean_the_same_samples(synthetic: Path, tmp_path: Path) -> None:
    beton = synthetic / "train.beton"
    names = sample_names(beton)
    chosen = [names[40], names[3], names[3]]
    assert read_subset(beton, listing(tmp_path, *chosen)) == [3, 40]
    assert read_subset(beton, listing(tmp_path, "40", "3", "", "3")) == [3, 40]
    assert read_subset(beton, None) is None


@pytest.mark.parametrize(
    ("line", "said"),
    [("none.jpg", "1 of 1 names are not there"), ("96", "asks for sample 96, samples are 0 to 95"), ("", "no image")],
)
def test_what_is_not_there_is_refused_by_name(synthetic: Path, tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(BetonError, match=said) as caught:
        read_subset(synthetic / "train.beton", listing(tmp_path, line))
    assert "some.txt" in str(caught.value)


def test_a_missing_list_is_named(synthetic: Path, tmp_path: Path) -> None:
    with pytest.raises(BetonError, match=r"nowhere\.txt"):
        read_subset(synthetic / "train.beton", tmp_path / "nowhere.txt")
