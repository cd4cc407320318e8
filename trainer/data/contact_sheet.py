"""A picture of real views: each source image with the boxes that were cut, beside what the network gets to see."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data_prep.schema import BetonError, read_samples, sample_names
from trainer.data.kernel import BRIGHTNESS, CONTRAST, HUE, SATURATION, Kernel

PALETTE = (
    "#e6194b", "#f58231", "#4363d8", "#3cb44b", "#911eb4", "#008080",
    "#9a6324", "#f032e6", "#808000", "#000075", "#469990", "#800000",
)  # fmt: skip
"""One colour a view, for its box on the source and its frame; the first two, warm, are usually the globals."""
SIDE, LEAST_SIDE, GAP, LINE = 288, 224, 12, 15
"""Pixels: the source image's longest side, the largest view's shortest, space between pictures, a line of text."""


@dataclass(frozen=True)
class Drawn:
    """One source image and its views, in the views' order."""

    name: str
    source: Image.Image
    views: list[NDArray[np.uint8]]
    """(S, S, 3) each."""
    params: NDArray[np.void]
    """(num_views,) of kernel.PARAMS."""


def draw_views(beton: Path, kernel: Kernel, sample_ids: Sequence[int]) -> list[Drawn]:
    """The views that training would see of these samples, in the kernel's epoch."""
    try:
        names = sample_names(beton)
    except BetonError:  # a file of FFCV's own writer
        names = []
    drawn = []
    for sample_id, jpeg in read_samples(beton, sample_ids):
        source = Image.open(BytesIO(jpeg))
        params = kernel.draw([sample_id], [source.width], [source.height])[:, 0]
        views = [view for run in kernel.render(jpeg, params, size=source.size) for view in run]
        drawn.append(Drawn(names[sample_id] if names else str(sample_id), source.convert("RGB"), views, params))
    return drawn


def contact_sheet(rows: Sequence[Drawn], title: str) -> Image.Image:
    """All of it as one picture: a row an image, the views at one common scale."""
    zoom = max(1, math.ceil(LEAST_SIDE / max(len(view) for view in rows[0].views)))
    pictures = [_row(row, zoom) for row in rows]
    width = pictures[0].width
    lines = textwrap.wrap(title, (width - 2 * GAP) // 6)  # a letter of the font is about 6 pixels wide
    top = (len(lines) + 1) * LINE
    sheet = Image.new("RGB", (width, top + sum(picture.height for picture in pictures)), "white")
    ImageDraw.Draw(sheet).text((GAP, GAP / 2), "\n".join(lines), "black", _font())
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def _row(row: Drawn, zoom: int) -> Image.Image:
    source, sides = _with_boxes(row), [len(view) * zoom for view in row.views]
    size = (SIDE + sum(sides) + GAP * (len(sides) + 2), GAP + max(source.height, *sides) + 4 * LINE)
    picture = Image.new("RGB", size, "white")
    pen, left = ImageDraw.Draw(picture), GAP
    picture.paste(source, (left, GAP))
    pen.text((left, GAP + source.height + 4), f"{_fit(row.name)}\n{_size(row.source)}", "black", _font())
    left += SIDE + GAP
    for index, (view, side) in enumerate(zip(row.views, sides, strict=True)):
        picture.paste(Image.fromarray(view).resize((side, side), Image.Resampling.NEAREST), (left, GAP))
        pen.rectangle((left - 2, GAP - 2, left + side + 1, GAP + side + 1), outline=_colour(index), width=2)
        drawn = f"{index}: {what_was_drawn(row.params[index])}"
        pen.text((left, GAP + side + 4), drawn, _colour(index), _font())
        left += side + GAP
    return picture


def _size(source: Image.Image) -> str:
    return f"{source.width} x {source.height}"


def _with_boxes(row: Drawn) -> Image.Image:
    """The source with every view's crop box in the view's colour."""
    scale = SIDE / max(row.source.size)
    picture = row.source.resize((round(row.source.width * scale), round(row.source.height * scale)))
    pen = ImageDraw.Draw(picture)
    for index, params in enumerate(row.params):
        box = (params["box"] * scale).tolist()
        pen.rectangle(box, outline="white", width=4)
        pen.rectangle(box, outline=_colour(index), width=2)
        pen.text((box[0] + 5, box[1] + 3), str(index), _colour(index), _font(), stroke_width=2, stroke_fill="white")
    return picture


def what_was_drawn(params: NDArray[np.void]) -> str:
    """One view's changes in at most three lines, such as 'flip, gray / b 1.20 c 0.85 s 1.01 h +0.04 / blur 1.3'."""
    left, top, right, bottom = params["box"]
    first = [f"{right - left:.0f} x {bottom - top:.0f}"]
    first += [word for word in ("flip", "gray") if params[word]]
    factor = params["factor"]
    jitter = (
        f"b {factor[BRIGHTNESS]:.2f} c {factor[CONTRAST]:.2f} s {factor[SATURATION]:.2f} h {factor[HUE]:+.2f}"
        if params["jitter"]
        else "no jitter"
    )
    last = [f"blur {params['sigma']:.1f}"] if params["sigma"] else []
    last += ["solarised"] if params["solarize"] else []
    return "\n".join([", ".join(first), jitter, ", ".join(last)])


def _fit(name: str, most: int = 46) -> str:
    return name if len(name) <= most else "..." + name[3 - most :]


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(11)
