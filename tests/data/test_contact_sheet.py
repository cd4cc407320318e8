"""The contact sheet shows what training sees, not a likeness of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.contact_sheet import contact_sheet, draw_views, what_was_drawn
from trainer.data.kernel import PARAMS, Kernel
from trainer.data.loader import ViewLoader
from trainer.data.views import View

VIEWS = [View(size=32, scale=(0.3, 1.0), blur_prob=1.0)] * 2 + [View(size=24, scale=(0.05, 0.3))] * 3


def test_its_views_are_those_of_the_loader_to_the_bit(synthetic: Path) -> None:
    loader = ViewLoader(synthetic / "train.beton", VIEWS, batch_size=4, seed=3)
    batch = next(loader.epoch(0))
    rows = draw_views(synthetic / "train.beton", Kernel(VIEWS, seed=3), batch.sample_ids.tolist())
    for slot, row in enumerate(rows):
        shown = [batch.views[0][i, slot] for i in range(2)] + [batch.views[1][i, slot] for i in range(3)]
        for ours, theirs in zip(row.views, shown, strict=True):
            assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy())
    loader.close()


def test_it_draws_every_row_with_its_boxes_and_views(synthetic: Path) -> None:
    rows = draw_views(synthetic / "train.beton", Kernel(VIEWS, seed=3), [0, 5, 9])
    sheet = contact_sheet(rows, "a title")
    pixels = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}  # type: ignore[union-attr]
    frames = {"#e6194b", "#f58231", "#4363d8", "#3cb44b", "#911eb4"}
    assert {tuple(bytes.fromhex(frame[1:])) for frame in frames} <= pixels
    view = Image.fromarray(rows[2].views[0])
    assert contains(sheet, view.resize((view.width * 7, view.height * 7), Image.Resampling.NEAREST))


def contains(sheet: Image.Image, part: Image.Image) -> bool:
    """Whether the picture stands somewhere in the sheet, pixel for pixel."""
    whole, wanted = np.asarray(sheet), np.asarray(part)
    height, width = wanted.shape[:2]
    corners = np.argwhere((whole == wanted[0, 0]).all(-1))
    return any(np.array_equal(whole[y : y + height, x : x + width], wanted) for y, x in corners)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "10 x 20\nno jitter\n"),
        ({"flip": 1, "gray": 1, "sigma": 1.25, "solarize": 1}, "10 x 20, flip, gray\nno jitter\nblur 1.2, solarised"),
        ({"jitter": 1, "factor": (1.1, 0.9, 1.2, -0.05)}, "10 x 20\nb 1.10 c 0.90 s 1.20 h -0.05\n"),
    ],
)
def test_it_says_what_was_drawn(changes: dict[str, object], said: str) -> None:
    params = np.zeros((), PARAMS)
    params["box"] = 5, 5, 15, 25
    for key, value in changes.items():
        params[key] = value
    assert what_was_drawn(params) == said
