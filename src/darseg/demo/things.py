"""Things that stand on the ground of a drawn scene: people, poles, signs and trees."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from darseg.demo.canvas import (
    PERSON,
    PLATES,
    POLE,
    SIGN,
    VEGETATION,
    Canvas,
    Color,
    Point,
    Shape,
    circle,
    scaled,
)

CLOTHES: tuple[Color, ...] = (
    (45, 48, 62),
    (150, 40, 45),
    (60, 85, 140),
    (185, 180, 165),
    (70, 95, 60),
    (30, 30, 32),
    (205, 150, 60),
)


def draw_person(canvas: Canvas, x: float, z: float) -> None:
    """A person on foot."""
    rng = canvas.rng
    tall, width = rng.uniform(1.5, 1.9), rng.uniform(0.2, 0.3)
    coat, legs = (scaled(CLOTHES[rng.integers(len(CLOTHES))], rng.uniform(0.8, 1.2)) for _ in range(2))
    skin = scaled((205, 160, 130), rng.uniform(0.45, 1.05))
    stride, lean = rng.uniform(0.02, 0.3), rng.normal(0, 0.05)

    def flat(points: Iterable[tuple[float, float]]) -> list[Point]:
        return [(x + s, u * tall, z) for s, u in points]

    shapes: list[Shape] = [
        (flat([(-0.02, 0.5), (0.14, 0.5), (stride + 0.06, 0), (stride - 0.08, 0)]), legs),
        (flat([(-0.14, 0.5), (0.02, 0.5), (0.08 - stride, 0), (-0.06 - stride, 0)]), scaled(legs, 0.8)),
        (flat([(-width, 0.82), (width, 0.82), (width * 0.75, 0.46), (-width * 0.75, 0.46)]), coat),
        (flat((lean + 0.11 * c, 0.92 + 0.07 * s) for s, c in circle(8)), skin),
    ]
    canvas.shadow([(x - 0.3, 0.0, z - 0.1), (x + 0.3, 0.0, z - 0.1), (x - canvas.sun, 0.0, z + 0.6)], 0.35)
    canvas.paint(shapes, PERSON, z)


def _post(canvas: Canvas, x: float, z: float, *, tall: float) -> Shape:
    """The post of a lamp or a sign: both have the same."""
    corners = [(x - 0.07, 0.0, z), (x + 0.07, 0.0, z), (x + 0.07, tall, z), (x - 0.07, tall, z)]
    return corners, scaled((118, 120, 122), canvas.rng.uniform(0.5, 1.3))


def draw_pole(canvas: Canvas, x: float, z: float, *, tall: float, arm: float) -> None:
    """A lamp post; a plain post if the length of `arm` (meters) is 0."""
    shapes = [_post(canvas, x, z, tall=tall)]
    if arm:
        tone, end = shapes[0][1], x + arm
        top, left, right = tall + 0.25, end - 0.3, end + 0.3
        shapes.append(([(x, tall, z), (end, tall + 0.2, z), (end, tall + 0.3, z), (x, tall + 0.1, z)], tone))
        head = [(left, tall, z), (right, tall, z), (right, top, z), (left, top, z)]
        shapes.append((head, scaled(tone, 1.2)))
    canvas.paint(shapes, POLE, z)
    if arm and canvas.weather == "night":
        canvas.shine((x + arm, tall, z), 0.8, (255, 215, 150))


def draw_sign(canvas: Canvas, x: float, z: float) -> None:
    """A traffic sign with its post: triangle, rectangle or disc."""
    rng = canvas.rng
    tall, radius = rng.uniform(2.1, 2.7), rng.uniform(0.3, 0.42)
    corners = int(rng.choice([3, 4, 10]))
    turned = math.pi / 2 if corners == 3 else math.pi / 4

    def plate(size: float) -> list[Point]:
        return [(x + size * c, tall + size * s, z) for s, c in circle(corners, turned)]

    rim, inner = (PLATES[n] for n in rng.permutation(len(PLATES))[:2])
    canvas.paint(
        [_post(canvas, x, z, tall=tall), (plate(radius), rim), (plate(radius * 0.6), inner)], SIGN, z
    )


def draw_tree(canvas: Canvas, x: float, z: float) -> None:
    """A trunk with a ragged crown."""
    rng, camera = canvas.rng, canvas.camera
    trunk, radius = rng.uniform(1.6, 3.0), rng.uniform(1.2, 2.6)
    bark = scaled((84, 68, 54), rng.uniform(0.6, 1.2))
    stem = [(x - 0.15, 0.0, z), (x + 0.15, 0.0, z), (x + 0.1, trunk + 1, z), (x - 0.1, trunk + 1, z)]
    if canvas.weather == "clear":
        cast = x - 1.5 * canvas.sun
        canvas.shadow([(cast + radius * c, 0.0, z + radius * s) for s, c in circle(12)], 0.35)
    canvas.paint([(stem, bark)], VEGETATION, z)

    (cx, cy), size = camera.project([(x, trunk + 0.8 * radius, z)])[0], radius * camera.pixels(z)
    left, right = max(int(cx - 1.5 * size), 0), min(int(cx + 1.5 * size) + 1, canvas.width)
    top, bottom = max(int(cy - 1.5 * size), 0), min(int(cy + 1.5 * size) + 1, canvas.height)
    if left >= right or top >= bottom:
        return
    height, width = bottom - top, right - left
    dy = ((np.arange(top, bottom) - cy) / size)[:, None].astype(np.float32)
    dx = ((np.arange(left, right) - cx) / size)[None].astype(np.float32)
    lumps = canvas.crop(1, height, width) + np.float32(0.5) * canvas.crop(0, height, width)
    crown = dx**2 + dy**2 * np.float32(1.1) + np.float32(0.22) * lumps < 1
    light = (np.float32(0.95) - np.float32(0.28) * dy + np.float32(0.22 * canvas.sun) * dx)[..., None]
    colors = canvas.leaves(height, width) * (light * np.float32(rng.uniform(0.75, 1.2)))
    canvas.cover((slice(top, bottom), slice(left, right)), crown, colors, label=VEGETATION, depth=z)
