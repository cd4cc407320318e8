"""Scenes of patterned objects, drawn in code: a class is a shape with a pattern, everything else varies.

Shape and pattern outlive cropping, flipping, colour changes and grey, so a network can learn them without labels.
Colour, place, size, number, light and background do not tell the class, so raw pixels hardly do.
"""

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.kinds import TURN, Kind, Plane, disc, square

Picture = npt.NDArray[np.float32]
"""(H, W, 3), 0 to 1."""

LEAN = 0.6
"""Objects lean by up to this angle either way."""
CHROMA = 0.1
"""How far the channels of a colour lie from its brightness."""


def draw_scene(kind: Kind, rng: np.random.Generator, *, min_side: int, max_side: int) -> npt.NDArray[np.uint8]:
    """One picture of 1 to 3 objects of a kind before something else, (H, W, 3)."""
    height, width = (int(side) for side in rng.integers(min_side, max_side, 2, endpoint=True))
    picture = _background(rng, height, width)
    for _ in range(rng.integers(0, 3)):
        _draw_distractor(picture, rng)
    for centre, radius in _places(rng, height, width):
        _draw_object(picture, kind, rng, centre, radius)
    return _photograph(picture, rng)


def _places(rng: np.random.Generator, height: int, width: int) -> list[tuple[Plane, float]]:
    """Centres and radii of objects that hardly overlap; the first one is large."""
    places: list[tuple[Plane, float]] = []
    for number in range(rng.integers(1, 4)):
        radius = min(height, width) * (rng.uniform(0.32, 0.48) if number == 0 else rng.uniform(0.18, 0.32))
        for _ in range(8):
            centre = (rng.uniform(0.2, 0.8, 2) * (width, height)).astype(np.float32)
            if all(np.hypot(*(centre - other)) > 0.85 * (radius + size) for other, size in places):
                places.append((centre, float(radius)))
                break
    return places


def _draw_object(picture: Picture, kind: Kind, rng: np.random.Generator, centre: Plane, radius: float) -> None:
    rows, columns, x, y = _local(picture, centre, radius, rng.uniform(-LEAN, LEAN), rng.uniform(0.8, 1.0))
    cover = _soft(-kind.outline(x, y) * np.float32(radius))
    shift = rng.uniform(-0.1, 0.1, 2).astype(np.float32)
    period = rng.uniform(0.36, 0.52)
    wave = kind.pattern(x + shift[0], y + shift[1], period)
    share = _soft(wave * np.float32(radius * period / TURN) * 2)[..., None]
    dark, light = _two_tones(rng)
    paint = dark + share * (light - dark)
    shade = 1 + np.float32(rng.uniform(0, 0.35)) * (x * np.float32(0.6) - y * np.float32(0.4))
    region = picture[rows, columns]
    shadow = _soft((np.float32(0.12) - kind.outline(x - np.float32(0.12), y - np.float32(0.12))) * 5)
    region *= 1 - np.float32(rng.uniform(0.1, 0.5)) * shadow[..., None]
    region += cover[..., None] * (paint * shade[..., None] - region)


def _local(
    picture: Picture, centre: Plane, radius: float, turn: float, squeeze: float
) -> tuple[slice, slice, Plane, Plane]:
    """The part of the picture around an object, and its own coordinates there: in radii, turned, seen from the side."""
    reach = radius * 1.25
    low, high = np.floor(centre - reach).astype(int), np.ceil(centre + reach).astype(int)
    columns = slice(max(low[0], 0), min(high[0], picture.shape[1]))
    rows = slice(max(low[1], 0), min(high[1], picture.shape[0]))
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) - centre[0])[None, :] / np.float32(radius)
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) - centre[1])[:, None] / np.float32(radius * squeeze)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return rows, columns, cos * x + sin * y, cos * y - sin * x


def _soft(distance: Plane) -> Plane:
    """Coverage of a pixel by its distance, in pixels, from an edge: anti-aliasing."""
    return np.asarray(np.clip(distance + np.float32(0.5), 0, 1), np.float32)


def _two_tones(rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Two colours that differ in brightness, so that a grey picture keeps the pattern; either may be the ground."""
    dark, light = _colour(rng, 0.05, 0.35), _colour(rng, 0.6, 0.95)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _colour(rng: np.random.Generator, darkest: float, lightest: float) -> Plane:
    """A muted colour, (3,): glaring ones would tell one picture from the next better than its objects do."""
    return (rng.uniform(darkest, lightest) + rng.normal(0, CHROMA, 3)).astype(np.float32).clip(0, 1)


def _background(rng: np.random.Generator, height: int, width: int) -> Picture:
    """A slope between two colours, clouds, and at times a horizon."""
    angle = rng.uniform(0, TURN)
    x, y = np.linspace(-1, 1, width, dtype=np.float32)[None, :], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    slope = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    if rng.random() < 0.35:
        slope = np.clip((slope - np.float32(rng.uniform(-0.6, 0.6))) * np.float32(rng.uniform(3, 40)), -1, 1)
    first, second = _colour(rng, 0.15, 0.85), _colour(rng, 0.15, 0.85)
    picture = first + (slope[..., None] * np.float32(0.5) + np.float32(0.5)) * (second - first)
    for cells in (3, int(rng.integers(5, 14))):
        coarse = rng.normal(0, rng.uniform(0.02, 0.07), (cells, cells, 3)).astype(np.float32)
        if rng.random() < 0.5:
            coarse[:] = coarse[:, :, :1]
        picture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture


def _draw_distractor(picture: Picture, rng: np.random.Generator) -> None:
    """A plain bar or blob that says nothing about the class."""
    height, width = picture.shape[:2]
    centre = (rng.uniform(0, 1, 2) * (width, height)).astype(np.float32)
    radius = float(min(height, width) * rng.uniform(0.06, 0.3))
    rows, columns, x, y = _local(picture, centre, radius, rng.uniform(0, TURN), rng.uniform(0.15, 1.0))
    outline = disc(x, y) if rng.random() < 0.5 else square(x, y)
    cover = _soft(-outline * np.float32(radius * rng.uniform(0.1, 1.0)))[..., None] * np.float32(rng.uniform(0.4, 1))
    colour = _colour(rng, 0.1, 0.9)
    region = picture[rows, columns]
    region += cover * (colour - region)


def _photograph(picture: Picture, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Light from one side, exposure, a lens that is not quite sharp, and noise."""
    height, width = picture.shape[:2]
    side = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * np.float32(rng.uniform(-0.3, 0.3))
    picture = np.clip(picture, 0, 1) * (1 + side) * np.float32(rng.uniform(0.65, 1.15))
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.4, 1.0)))
    noise = rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(0.01, 0.03))
    return (np.clip(picture + noise[..., None], 0, 1) * 255).astype(np.uint8)
