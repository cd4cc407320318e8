"""Shapes and the patterns on them: what tells the classes of the embedded data set apart."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]
"""(H, W), or what broadcasts to it."""
Outline = Callable[[Plane, Plane], Plane]
"""Distance to the outline, negative inside; the shape fills about the unit disc, y points down."""
Pattern = Callable[[Plane, Plane, float], Plane]
"""Waves of about -1 to 1 with the given period, in units of the object's radius."""

TURN = 2 * np.pi


def _radius(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.hypot(x, y), np.float32)


def _angle(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.arctan2(y, x), np.float32)


def _high(a: Plane, b: Plane) -> Plane:
    return np.asarray(np.maximum(a, b), np.float32)


def _low(a: Plane, b: Plane) -> Plane:
    return np.asarray(np.minimum(a, b), np.float32)


def _apart(a: Plane, b: float) -> Plane:
    return np.asarray(np.abs(a - np.float32(b)), np.float32)


def _gap(cycles: Plane) -> Plane:
    """Distance to the nearest whole number."""
    return np.asarray(np.abs(cycles - np.round(cycles)), np.float32)


def _sine(cycles: Plane) -> Plane:
    return np.asarray(np.sin(cycles * np.float32(TURN)), np.float32)


def disc(x: Plane, y: Plane) -> Plane:
    return _radius(x, y) - np.float32(0.95)


def _ring(x: Plane, y: Plane) -> Plane:
    return _apart(_radius(x, y), 0.72) - np.float32(0.28)


def square(x: Plane, y: Plane) -> Plane:
    return _high(np.abs(x), np.abs(y)) - np.float32(0.8)


def _frame(x: Plane, y: Plane) -> Plane:
    return _apart(_high(np.abs(x), np.abs(y)), 0.65) - np.float32(0.25)


def _triangle(x: Plane, y: Plane) -> Plane:
    return _high(np.abs(x) * np.float32(0.866) - y * np.float32(0.5), y) - np.float32(0.55)


def _hexagon(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return _high(x * np.float32(0.866) + y * np.float32(0.5), y) - np.float32(0.85)


def _star(x: Plane, y: Plane) -> Plane:
    """Five points: one half point, folded ten times."""
    radius = _radius(x, y)
    fold = np.float32(0.2) * _gap(_angle(x, y) * np.float32(5 / TURN))
    return radius * _sine(fold + np.float32(0.107)) - np.float32(0.653)


def _cross(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return _high(_low(x, y) - np.float32(0.34), _high(x, y) - np.float32(0.95))


def _crescent(x: Plane, y: Plane) -> Plane:
    return _high(_radius(x, y) - 1, np.float32(0.72) - _radius(x - np.float32(0.55), y))


def _heart(x: Plane, y: Plane) -> Plane:
    """A square on its corner with a disc on two sides."""
    x = np.abs(x)
    body = x + np.abs(y - np.float32(0.1)) - np.float32(0.85)
    lobe = _radius(x - np.float32(0.42), y + np.float32(0.32)) - np.float32(0.6)
    return _low(body * np.float32(0.71), lobe)


def _flower(x: Plane, y: Plane) -> Plane:
    return _radius(x, y) - np.float32(0.72) - np.float32(0.27) * _sine(_angle(x, y) * np.float32(6 / TURN))


def _leaf(x: Plane, y: Plane) -> Plane:
    return _radius(np.abs(x) + np.float32(0.6), y) - np.float32(1.17)


def _stripes(x: Plane, y: Plane, period: float) -> Plane:
    return _sine(x / np.float32(period))


def _checks(x: Plane, y: Plane, period: float) -> Plane:
    cell = np.float32(1.3 * period)
    return 2 * _sine(x / cell) * _sine(y / cell)


def _dots(x: Plane, y: Plane, period: float) -> Plane:
    return _sine(x / np.float32(period)) + _sine(y / np.float32(period)) - np.float32(0.7)


def _circles(x: Plane, y: Plane, period: float) -> Plane:
    return _sine(_radius(x, y) / np.float32(period))


def _spokes(x: Plane, y: Plane, period: float) -> Plane:
    return _sine(_angle(x, y) * np.float32(round(4 / period) / TURN))


def _zigzag(x: Plane, y: Plane, period: float) -> Plane:
    tooth = np.abs((x / np.float32(period)) % 1 - np.float32(0.5))
    return _sine(y / np.float32(period) + tooth * np.float32(1.2))


def _bricks(x: Plane, y: Plane, period: float) -> Plane:
    row = y / np.float32(period)
    across = x / np.float32(2 * period) + np.floor(row) * np.float32(0.5)
    return (_low(_gap(row), 2 * _gap(across)) - np.float32(0.13)) * 8


def _mesh(x: Plane, y: Plane, period: float) -> Plane:
    """Thin lines both ways."""
    return (_low(_gap(x / np.float32(period)), _gap(y / np.float32(period))) - np.float32(0.13)) * 8


def _lattice(x: Plane, y: Plane, period: float) -> Plane:
    """Cells between thin lines at 0, 60 and 120 degrees."""
    x, y = x / np.float32(1.2 * period), y / np.float32(1.2 * period)
    slanted = np.float32(0.5) * x + np.float32(0.866) * y, np.float32(0.5) * x - np.float32(0.866) * y
    return (_low(_gap(x), _low(_gap(slanted[0]), _gap(slanted[1]))) - np.float32(0.1)) * 8


def _spiral(x: Plane, y: Plane, period: float) -> Plane:
    """Three arms."""
    return _sine(_angle(x, y) * np.float32(3 / TURN) + _radius(x, y) / np.float32(1.4 * period))


def _half(x: Plane, y: Plane, period: float) -> Plane:
    """Two halves, each in one colour."""
    return (x + np.float32(0.15) * y) * 6


def _spot(x: Plane, y: Plane, period: float) -> Plane:
    """One large spot off the middle."""
    return np.float32(1.1) - 2 * _radius(x - np.float32(0.3), y + np.float32(0.3))


@dataclass(frozen=True, slots=True)
class Kind:
    """What makes a class."""

    outline: Outline
    pattern: Pattern


KINDS: dict[str, Kind] = {
    "brick_square": Kind(square, _bricks),
    "checked_star": Kind(_star, _checks),
    "dotted_heart": Kind(_heart, _dots),
    "eye_disc": Kind(disc, _spot),
    "halved_crescent": Kind(_crescent, _half),
    "latticed_hexagon": Kind(_hexagon, _lattice),
    "meshed_frame": Kind(_frame, _mesh),
    "spiral_ring": Kind(_ring, _spiral),
    "spoked_flower": Kind(_flower, _spokes),
    "striped_triangle": Kind(_triangle, _stripes),
    "target_leaf": Kind(_leaf, _circles),
    "zigzag_cross": Kind(_cross, _zigzag),
}
CLASSES = tuple(KINDS)
