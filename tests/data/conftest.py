"""Betons shared by the tests of this folder."""

from pathlib import Path

import pytest

from tests.data.pictures import jpeg, picture, write_beton

NUM_IMAGES = 41


@pytest.fixture(scope="session")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 sound JPEGs of different sizes."""
    sizes = [(40 + 7 * (i % 9), 30 + 5 * (i % 7)) for i in range(NUM_IMAGES)]
    images = [jpeg(picture(*size, seed=i)) for i, size in enumerate(sizes)]
    return write_beton(tmp_path_factory.mktemp("sound") / "sound.beton", images, sizes)
