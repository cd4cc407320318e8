"""Real JPEGs, real conversions, and files that FFCV's own writer made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.convert import convert
from data_prep.images import Encoding
from data_prep.kinds import CLASSES
from data_prep.sources import Item, Listing, list_source
from data_prep.synth import Picture, Plan, draw_jpeg

PLAN = Plan(seed=7, size=(40, 90))
USED = CLASSES[:3]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 class folders with 7, 6 and 5 JPEGs of 40 to 90 pixels."""
    root = tmp_path_factory.mktemp("source") / "shapes"
    for label, name in enumerate(USED):
        (root / name).mkdir(parents=True)
        for index in range(7 - label):
            (root / name / f"{index}.jpg").write_bytes(draw_jpeg(PLAN, Picture("train", label, index)))
    return root


@pytest.fixture(scope="session")
def converted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as a .beton, longest side 64. Not to be changed: copy it with its companions first."""
    out = tmp_path_factory.mktemp("converted") / "shapes.beton"
    assert convert(list_source(images), out, encoding=Encoding(max_size=64), workers=2) is not None
    return out


@dataclass(frozen=True)
class BytesReader:
    """A source that lies in memory; pickles to the workers as every reader does."""

    contents: dict[str, bytes] = field(repr=False)

    def read(self, item: Item) -> bytes:
        return self.contents[item.name]


@pytest.fixture(scope="session")
def listing_of() -> Callable[[dict[str, bytes]], Listing]:
    """Makes an unlabelled listing of files that exist in memory only."""

    def make(contents: dict[str, bytes]) -> Listing:
        return Listing(
            "memory", [Item(name, -1, len(data)) for name, data in contents.items()], BytesReader(contents), None
        )

    return make


@pytest.fixture(scope="session")
def written_by_ffcv(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of FFCV's DatasetWriter: `jpg` as data_prep would write it, `raw` with pixels and without labels."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from PIL import Image

    folder = tmp_path_factory.mktemp("ffcv")
    samples = [
        (np.asarray(Image.open(path).convert("RGB")), USED.index(path.parent.name))
        for path in sorted(images.glob("*/*.jpg"))
    ]
    jpg = DatasetWriter(
        str(folder / "jpg.beton"),
        num_workers=1,
        fields={"image": RGBImageField("jpg", max_resolution=64), "label": IntField()},
    )
    jpg.from_indexed_dataset(samples)
    raw = DatasetWriter(str(folder / "raw.beton"), num_workers=1, fields={"image": RGBImageField("raw")})
    raw.from_indexed_dataset([(image,) for image, _ in samples])
    return {"jpg": folder / "jpg.beton", "raw": folder / "raw.beton"}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command of data_prep; gives its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call
