"""Data that the tests make for themselves, once a session, with the project's own commands."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.beton (12 classes x 8 images) and val.beton (12 x 3), drawn and converted by data_prep."""
    folder = tmp_path_factory.mktemp("synthetic")
    synth = ["synth", str(folder / "images"), "--images-per-class", "8", "--val-per-class", "3"]
    convert = [
        ["convert", str(folder / "images"), str(folder / f"{split}.beton"), "--split", split]
        for split in ("train", "val")
    ]
    for command in (synth, *convert):
        subprocess.run([sys.executable, "-m", "data_prep", *command], check=True, timeout=400)
    return folder
