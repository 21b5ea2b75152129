"""What a scene is drawn on: picture, labels, distances, camera and noise, and the ways to paint.

Everything that takes a `Canvas` draws random numbers from its generator, so the order of calls decides the pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from darseg.data.classes import ClassSet

SCENE_CLASSES = ClassSet(
    names=(
        "sky",
        "road",
        "path",
        "building",
        "vegetation",
        "grass",
        "car",
        "van",
        "person",
        "pole",
        "sign",
    ),
    colors=(
        (70, 130, 180),
        (128, 64, 128),
        (244, 35, 232),
        (80, 70, 70),
        (40, 120, 35),
        (152, 251, 152),
        (0, 0, 200),
        (0, 180, 230),
        (220, 20, 60),
        (190, 170, 150),
        (250, 220, 0),
    ),
)
"""The classes of the drawn scenes, from about 40 % (road) to about 0.03 % (sign) of all pixels."""

SKY, ROAD, PATH, BUILDING, VEGETATION, GRASS, CAR, VAN, PERSON, POLE, SIGN = range(len(SCENE_CLASSES))

SIDES = (65, 385)
"""Smallest and largest side of a scene, in pixels."""

BANK = 512
"""Side of the noise fields; a power of two, so that world coordinates wrap with a mask."""

Color = tuple[float, float, float]
Point = tuple[float, float, float]  # meters: right of the middle of the street, up, ahead
Shape = tuple[Sequence[Point], Color]  # corners of a polygon and its RGB
Area = tuple[slice, slice]  # rows, columns

PLATES: tuple[Color, ...] = ((196, 30, 36), (28, 78, 170), (232, 190, 40), (225, 225, 225))
FRONTS: tuple[Color, ...] = (
    (150, 84, 66),
    (176, 138, 104),
    (196, 186, 164),
    (132, 128, 126),
    (104, 100, 106),
    (186, 160, 120),
    (120, 92, 80),
)


@functools.lru_cache(maxsize=1)
def noise() -> tuple[np.ndarray, ...]:
    """Fine, middle and coarse noise, float32 [BANK, BANK], mean 0 and deviation 1, without seams.

    The fourth field is white in three channels, for the sensor.
    """
    rng = np.random.default_rng(20210806)
    fields = []
    for sigma in (0.6, 2.5, 9.0):
        white = rng.standard_normal((BANK, BANK), np.float32)
        edge = 4 * int(sigma + 1)
        padded = cv2.copyMakeBorder(white, edge, edge, edge, edge, cv2.BORDER_WRAP)
        field = cv2.GaussianBlur(padded, (0, 0), sigma)[edge:-edge, edge:-edge]
        field = (field - field.mean()) / field.std()
        field.setflags(write=False)
        fields.append(field)
    return (*fields, rng.standard_normal((BANK, BANK, 3), np.float32))


def part(values: np.ndarray) -> np.ndarray:
    """The fractional part of each value; `% 1` is many times slower."""
    return values - np.floor(values)


def rgb(color: Sequence[float]) -> np.ndarray:
    """A color as float32 [3]."""
    return np.array(color, np.float32)


def scaled(color: Sequence[float], factor: float) -> Color:
    """A lighter or darker color."""
    return (color[0] * factor, color[1] * factor, color[2] * factor)


def circle(corners: int, turned: float = 0.0) -> list[tuple[float, float]]:
    """(sine, cosine) of `corners` directions all around."""
    turns = (2 * math.pi * n / corners + turned for n in range(corners))
    return [(math.sin(turn), math.cos(turn)) for turn in turns]


@dataclass(frozen=True)
class Camera:
    """Pinhole camera above the middle of the street: x right, `up` from the ground, z forward, in meters.

    Attributes:
        horizon, center: row and column in pixels at which the camera looks.
        focal: focal length in pixels.
        above: height of the camera over the ground, in meters.
        bend: curvature of the street; at distance z its middle lies bend * z * z to the right.
    """

    horizon: float
    center: float
    focal: float
    above: float
    bend: float

    def project(self, points: Sequence[Point]) -> np.ndarray:
        """Points in meters → their pixels (x, y), float64 [N, 2]."""
        x, up, z = np.array(points, np.float64).T
        z = np.maximum(z, 1.0)
        scale = self.focal / z
        pixels = np.empty((len(x), 2))
        pixels[:, 0] = self.center + scale * (x + self.bend * z * z)
        pixels[:, 1] = self.horizon + scale * (self.above - up)
        return pixels

    def pixels(self, z: float) -> float:
        """Pixels per meter at distance z."""
        return self.focal / max(z, 1.0)


class Canvas:
    """One scene being drawn.

    Attributes:
        image: float32 [H, W, 3], RGB.
        label: uint8 [H, W].
        depth: float32 [H, W], meters.
        glow: float32 [H, W, 3], the light of lamps at night.
        weather: "clear", "overcast", "fog" or "night".
        sun: the side the light comes from, -1 (left) or 1.
        tint: factors [3] for the colors of leaves and lawn.
        half: meters from the middle of the road to the curb.
        walks, lawns: widths [2] in meters of sidewalks and lawns, left and right.
        built: bool [2], whether houses stand on a side.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        # The order of the draws below is part of the data set: another order gives other scenes.
        self.rng = rng
        self.height, self.width = height, width
        self.camera = Camera(
            horizon=height * rng.uniform(0.34, 0.46),
            center=width * rng.uniform(0.34, 0.66),
            focal=width * rng.uniform(0.62, 0.85),
            above=rng.uniform(1.7, 3.0),
            bend=rng.normal(0.0, 0.0012),
        )
        self.image = np.empty((height, width, 3), np.float32)
        self.label = np.zeros((height, width), np.uint8)
        self.depth = np.full((height, width), 1e4, np.float32)
        self.glow = np.zeros((height, width, 3), np.float32)
        self.weather = str(rng.choice(["clear", "overcast", "fog", "night"], p=[0.42, 0.26, 0.14, 0.18]))
        self.sun = float(rng.choice([-1.0, 1.0]))
        self.tint = rng.uniform(0.85, 1.15, 3)
        self.half = rng.uniform(4.2, 7.0)
        self.walks = np.where(rng.random(2) < 0.85, rng.uniform(1.3, 3.2, 2), 0.3)
        self.lawns = np.where(rng.random(2) < 0.6, rng.uniform(0.8, 5.0, 2), 0.0)
        self.built = rng.random(2) < 0.62

    def crop(self, scale: int, height: int, width: int) -> np.ndarray:
        """A random piece [height, width] of the noise of one scale (0 fine, 1 middle, 2 coarse, 3 sensor)."""
        top, left = self.rng.integers(0, BANK - max(SIDES), 2)
        return noise()[scale][top : top + height, left : left + width]

    def leaves(self, height: int, width: int) -> np.ndarray:
        """Colors of foliage, float32 [height, width, 3]."""
        grain, lumps = self.crop(0, height, width), self.crop(1, height, width)
        dark = (1 + np.float32(0.22) * grain + np.float32(0.2) * lumps).clip(0.25, 1.8)
        return dark[..., None] * (np.array([70, 94, 46]) * self.tint).astype(np.float32)

    def cover(
        self, area: Area, where: np.ndarray, colors: np.ndarray, *, label: int, depth: np.ndarray | float
    ) -> np.ndarray:
        """Paint the pixels `where` of an area, except those that something nearer covers.

        Args:
            area: rows and columns of the picture.
            where: bool [h, w].
            colors: float32 [h, w, 3], RGB.
            depth: meters, one number or float32 that fits [h, w].

        Returns:
            the painted pixels, bool [h, w].
        """
        behind = self.depth[area]
        where = where & (depth < behind)
        np.copyto(self.image[area], colors, where=where[..., None])
        np.copyto(self.label[area], np.uint8(label), where=where)
        np.copyto(behind, np.float32(depth), where=where)
        return where

    def paint(self, shapes: Sequence[Shape], label: int, z: float) -> None:
        """Fill polygons one over the other, except where something nearer stands; z in meters."""
        corners = self.camera.project([point for points, _ in shapes for point in points])
        left, top = np.maximum(np.floor(corners.min(0)).astype(int), 0)
        right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, (self.width, self.height))
        if left >= right or top >= bottom:
            return
        area = (slice(top, bottom), slice(left, right))
        corners = np.rint(corners - (left, top)).astype(np.int32)
        patch = self.image[area].copy()
        mask = np.zeros(patch.shape[:2], np.uint8)
        first = 0
        for points, color in shapes:
            polygon = [corners[first : first + len(points)]]
            cv2.fillPoly(patch, polygon, color)
            cv2.fillPoly(mask, polygon, 1.0)
            first += len(points)
        # The ground just in front of a thing's foot is a little nearer than the thing itself.
        seen = (mask > 0) & (self.depth[area] > 0.9 * z - 0.3)
        np.copyto(self.image[area], patch, where=seen[..., None])
        self.label[area][seen] = label
        self.depth[area][seen] = z
        self.glow[area][seen] = 0  # it hides lamps behind it

    def shadow(self, points: Sequence[Point], strength: float) -> None:
        """Darken the ground inside a polygon of the ground plane."""
        corners = np.rint(self.camera.project(points)).astype(np.int32)
        left, top = np.maximum(corners.min(0), 0)
        right, bottom = np.minimum(corners.max(0) + 1, (self.width, self.height))
        if left >= right or top >= bottom:
            return
        area = (slice(top, bottom), slice(left, right))
        mask = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(mask, [(corners - (left, top)).astype(np.int32)], 1.0)
        label = self.label[area]
        on = (mask > 0) & ((label == ROAD) | (label == PATH) | (label == GRASS))
        self.image[area][on] *= 1 - strength

    def shine(self, lamp: Point, radius: float, color: Color) -> None:
        """Let a lamp glow at night; call it after the lamp's own thing is painted. `radius` in meters."""
        x, y = (round(float(value)) for value in self.camera.project([lamp])[0])
        in_view = 0 <= x < self.width and 0 <= y < self.height
        if in_view and self.depth[y, x] > 0.9 * lamp[2] - 0.3:
            cv2.circle(self.glow, (x, y), max(1, round(radius * self.camera.pixels(lamp[2]))), color, -1)
