"""Drawn street scenes with exact labels: a small long-tailed data set that needs no download.

A scene is a pinhole view along a street. Ground and house fronts are ray-cast, so their textures get
coarser toward the viewer; everything that stands on the ground is drawn from far to near, so near things
hide far ones. Label and picture come from the same shapes; lighting, fog, blur and sensor noise then touch
the picture alone.

Some classes cannot be told by color. They differ only by

    road / path           place, curb and paving pattern (either may be asphalt)
    vegetation / grass    texture and shape (a hedge has the color of a lawn)
    car / van             shape (the paints are the same)
    pole / sign           the plate, a few pixels, and the height (the posts are the same)
    sign / building       place (posters on house fronts have the colors of plates)

The pixels of a scene depend on its seed and index alone, not on which scenes were drawn before.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from darseg.data.classes import IGNORE, ClassSet
from darseg.data.files import storage_error, write_whole
from darseg.data.maps import write_map
from darseg.errors import DataError, SizeError

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

VERSION = 1
"""Goes up with every change that alters a pixel, so that sets drawn before are drawn anew."""

SKY, ROAD, PATH, BUILDING, VEGETATION, GRASS, CAR, VAN, PERSON, POLE, SIGN = range(len(SCENE_CLASSES))

_SIDES = (65, 385)
_BANK = 512  # side of the noise fields; a power of two, so that world coordinates wrap with a mask
_FAR = 160.0  # meters; the ground ends here
_MARKER = "scenes.json"

Color = tuple[float, float, float]
Point = tuple[float, float, float]  # meters: right of the middle of the street, up, ahead
Shape = tuple[Sequence[Point], Color]  # corners of a polygon and its RGB
Area = tuple[slice, slice]  # rows, columns

_PAINTS: tuple[Color, ...] = (
    (222, 222, 218),
    (165, 168, 172),
    (92, 95, 100),
    (40, 41, 45),
    (150, 32, 30),
    (36, 62, 128),
    (50, 92, 66),
    (196, 160, 60),
)
_CAR_PAINT = (0.16, 0.18, 0.16, 0.16, 0.12, 0.12, 0.05, 0.05)
_VAN_PAINT = (0.32, 0.16, 0.12, 0.08, 0.10, 0.12, 0.05, 0.05)
_CLOTHES: tuple[Color, ...] = (
    (45, 48, 62),
    (150, 40, 45),
    (60, 85, 140),
    (185, 180, 165),
    (70, 95, 60),
    (30, 30, 32),
    (205, 150, 60),
)
_PLATES: tuple[Color, ...] = ((196, 30, 36), (28, 78, 170), (232, 190, 40), (225, 225, 225))
_FRONTS: tuple[Color, ...] = (
    (150, 84, 66),
    (176, 138, 104),
    (196, 186, 164),
    (132, 128, 126),
    (104, 100, 106),
    (186, 160, 120),
    (120, 92, 80),
)
# How strongly fine grain modulates each class; leaves and lawn get theirs when drawn.
_GRAIN = np.array([0.008, 0.05, 0.05, 0.04, 0.08, 0.08, 0.03, 0.03, 0.06, 0.03, 0.03], np.float32)


def draw_scene(seed: int, index: int, size: tuple[int, int] = (129, 193)) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of the set `seed`, both >= 0: image uint8 [H, W, 3] RGB and label uint8 [H, W].

    Labels are indices into SCENE_CLASSES, 255 along the outlines of vehicles. Raises SizeError unless both
    sides lie in 65..385, DataError for a negative seed or index.
    """
    height, width = size
    if not all(_SIDES[0] <= side <= _SIDES[1] for side in size):
        raise SizeError(
            f"Scenes of {height} x {width} pixels: both sides must lie in {_SIDES[0]}..{_SIDES[1]}; "
            "129 x 193 is the usual size."
        )
    if seed < 0 or index < 0:
        raise DataError(f"Scene {index} of seed {seed}: neither may be negative; take numbers from 0 up.")
    return _Scene(np.random.default_rng([seed, index]), height, width).finish()


def write_scenes(root: Path, labeled: int, unlabeled: int, validation: int, seed: int) -> None:
    """Draw a data set into `root`: images/*.png, labels/*.png and three lists of ids.

    labeled.txt, unlabeled.txt and validation.txt hold one id per line. The truth of unlabeled scenes is
    written too, for measuring pseudo-labels. Validation scenes come first in the numbering and labeled ones
    next, so sets that differ only in the later counts share the earlier scenes. A complete set of the same
    seed, counts and drawing version is left alone; another is overwritten. Raises DataError where a count or
    the seed makes no sense, StorageError where the folder cannot be written.
    """
    if labeled < 1 or unlabeled < 0 or validation < 0 or seed < 0:
        raise DataError(
            f"Scenes for labeled={labeled}, unlabeled={unlabeled}, validation={validation}, seed={seed}: "
            "at least 1 labeled scene is needed and nothing may be negative."
        )
    ids = [f"scene_{index:05d}" for index in range(validation + labeled + unlabeled)]
    lists = {
        "validation.txt": ids[:validation],
        "labeled.txt": ids[validation : validation + labeled],
        "unlabeled.txt": ids[validation + labeled :],
    }
    marker = root / _MARKER
    wanted = json.dumps(
        {
            "drawing": VERSION,
            "seed": seed,
            "labeled": labeled,
            "unlabeled": unlabeled,
            "validation": validation,
        }
    )
    files = [root / name for name in lists]
    files += [root / folder / f"{id_}.png" for folder in ("images", "labels") for id_ in ids]
    if marker.is_file() and marker.read_bytes() == wanted.encode() and all(file.is_file() for file in files):
        return
    try:
        marker.unlink(missing_ok=True)  # from here until the end the set is not complete
    except OSError as error:
        raise storage_error(error, marker) from error
    for index, id_ in enumerate(ids):
        image, label = draw_scene(seed, index)
        write_map(root / "images" / f"{id_}.png", image[..., ::-1])
        write_map(root / "labels" / f"{id_}.png", label)
    for name, members in lists.items():
        write_whole(root / name, "".join(f"{id_}\n" for id_ in members).encode())
    write_whole(marker, wanted.encode())


@functools.lru_cache(maxsize=1)
def _noise() -> tuple[np.ndarray, ...]:
    """Fine, middle and coarse noise, float32 [_BANK, _BANK], mean 0 and deviation 1, without seams.

    The fourth field is white in three channels, for the sensor.
    """
    rng = np.random.default_rng(20210806)
    fields = []
    for sigma in (0.6, 2.5, 9.0):
        white = rng.standard_normal((_BANK, _BANK), np.float32)
        edge = 4 * int(sigma + 1)
        padded = cv2.copyMakeBorder(white, edge, edge, edge, edge, cv2.BORDER_WRAP)
        field = cv2.GaussianBlur(padded, (0, 0), sigma)[edge:-edge, edge:-edge]
        field = (field - field.mean()) / field.std()
        field.setflags(write=False)
        fields.append(field)
    return (*fields, rng.standard_normal((_BANK, _BANK, 3), np.float32))


def _part(values: np.ndarray) -> np.ndarray:
    """The part behind the point; `% 1` is many times slower."""
    return values - np.floor(values)


def _rgb(color: Sequence[float]) -> np.ndarray:
    return np.array(color, np.float32)


def _scaled(color: Sequence[float], factor: float) -> Color:
    return (color[0] * factor, color[1] * factor, color[2] * factor)


def _circle(corners: int, turned: float = 0.0) -> list[tuple[float, float]]:
    """(sine, cosine) of `corners` directions all around."""
    turns = (2 * math.pi * n / corners + turned for n in range(corners))
    return [(math.sin(turn), math.cos(turn)) for turn in turns]


@dataclass(frozen=True)
class _Camera:
    """Pinhole camera above the middle of the street: x right, `up` from the ground, z forward, in meters.

    `bend` curves the street: at distance z its middle lies bend * z * z to the right.
    """

    horizon: float
    center: float
    focal: float
    above: float
    bend: float

    def project(self, points: Sequence[Point]) -> np.ndarray:
        """(x from the middle of the street, up, z) to pixels (x, y), float64 [N, 2]."""
        x, up, z = np.array(points, np.float64).T
        z = np.maximum(z, 1.0)
        scale = self.focal / z
        pixels = np.empty((len(x), 2))
        pixels[:, 0] = self.center + scale * (x + self.bend * z * z)
        pixels[:, 1] = self.horizon + scale * (self.above - up)
        return pixels

    def pixels(self, z: float) -> float:
        """How many pixels a meter has at distance z."""
        return self.focal / max(z, 1.0)


class _Scene:
    """One scene being drawn: picture, labels and distances, filled by the steps of __init__ in order."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng = rng
        self.height, self.width = height, width
        self.camera = _Camera(
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
        self.sun = float(rng.choice([-1.0, 1.0]))  # the side the light comes from
        self.tint = rng.uniform(0.85, 1.15, 3)  # of leaves and lawn in this scene
        self.half = rng.uniform(4.2, 7.0)  # meters from the middle of the road to the curb
        self.walks = np.where(rng.random(2) < 0.85, rng.uniform(1.3, 3.2, 2), 0.3)  # left, right
        self.lawns = np.where(rng.random(2) < 0.6, rng.uniform(0.8, 5.0, 2), 0.0)
        self.built = rng.random(2) < 0.62
        self.sky()
        self.skyline()
        self.ground()
        for side in (0, 1):
            if self.built[side]:
                self.houses(side)
            if rng.random() < (0.12 if self.built[side] else 0.6):
                self.hedge(side)
        for _, step in sorted(self.things(), key=lambda thing: -thing[0]):
            step()

    # Surfaces

    def crop(self, scale: int, height: int, width: int) -> np.ndarray:
        """A random piece [height, width] of the noise of that scale (0 fine, 1 middle, 2 coarse)."""
        top, left = self.rng.integers(0, _BANK - max(_SIDES), 2)
        return _noise()[scale][top : top + height, left : left + width]

    def sky(self) -> None:
        base = {
            "clear": ((92, 142, 205), (196, 214, 226)),
            "overcast": ((168, 174, 182), (206, 208, 210)),
            "fog": ((188, 190, 192), (204, 205, 206)),
            "night": ((70, 84, 120), (120, 118, 128)),
        }[self.weather]
        bottom = int(self.camera.horizon) + 1
        zenith, haze = np.array(base, np.float32) * np.float32(self.rng.uniform(0.9, 1.08))
        rise = np.linspace(0, 1.1, bottom, dtype=np.float32).clip(0, 1)[:, None, None]
        colors = zenith + (haze - zenith) * rise
        cover = self.rng.uniform(-0.9, 0.7)
        clouds = self.crop(2, bottom, self.width) + np.float32(0.3) * self.crop(1, bottom, self.width)
        amount = ((clouds + np.float32(cover)) * np.float32(0.5)).clip(0, 0.8)[..., None]
        self.image[:bottom] = colors + (np.float32(232) - colors) * amount

    def skyline(self) -> None:
        """Far roofs and trees along the horizon."""
        rng, camera = self.rng, self.camera
        bottom = int(camera.horizon) + 1
        top = max(bottom - int(camera.pixels(100.0) * 26) - 1, 0)
        area = (slice(top, bottom), slice(0, self.width))
        rows, columns = np.arange(top, bottom)[:, None], np.arange(self.width)
        edges = np.sort(rng.uniform(0, self.width, 9))
        steps = rng.uniform(3, 26, 10) * (rng.random(10) < 0.75)
        tones = np.array(_FRONTS, np.float32)[rng.integers(0, len(_FRONTS), 10)]
        block = np.searchsorted(edges, columns)
        shade = 1 + np.float32(0.08) * self.crop(1, bottom - top, self.width)
        shade -= np.float32(0.2) * ((rows % 3 == 0) & (columns % 3 > 0))
        roofs = rows > camera.horizon - camera.pixels(130.0) * steps[block]
        self.cover(area, roofs, tones[block][None] * shade[..., None], BUILDING, 130.0)
        waves = self.crop(2, 1, self.width)[0] + 0.5 * self.crop(0, 1, self.width)[0]
        crowns = rows > camera.horizon - camera.pixels(100.0) * (rng.uniform(1.0, 6.0) + 2.5 * waves)
        self.cover(area, crowns, self.leaves(bottom - top, self.width), VEGETATION, 100.0)

    def leaves(self, height: int, width: int) -> np.ndarray:
        grain, lumps = self.crop(0, height, width), self.crop(1, height, width)
        dark = (1 + np.float32(0.22) * grain + np.float32(0.2) * lumps).clip(0.25, 1.8)
        return dark[..., None] * (np.array([70, 94, 46]) * self.tint).astype(np.float32)

    def cover(
        self, area: Area, where: np.ndarray, colors: np.ndarray, label: int, depth: np.ndarray | float
    ) -> np.ndarray:
        """Paint those pixels `where` of the area that are nearer than what is there; returns which."""
        behind = self.depth[area]
        where = where & (depth < behind)
        np.copyto(self.image[area], colors, where=where[..., None])
        np.copyto(self.label[area], np.uint8(label), where=where)
        np.copyto(behind, np.float32(depth), where=where)
        return where

    def ground(self) -> None:
        rng, camera = self.rng, self.camera
        top = int(camera.horizon) + 1
        rows = np.arange(top, self.height, dtype=np.float32)[:, None]
        columns = np.arange(self.width, dtype=np.float32)[None]
        z = np.minimum(camera.focal * camera.above / (rows - camera.horizon), _FAR)
        x = (columns - camera.center) * (z / camera.focal) - camera.bend * z * z
        near = (10.0 / z).clip(0, 1)  # detail is lost with distance

        side = (x > 0).astype(np.intp)
        beyond = np.abs(x) - self.half
        walk, lawn = self.walks.astype(np.float32), self.lawns.astype(np.float32)
        # Behind path and lawn lies the yard: grass as a rule, sometimes paved.
        yard = np.where(rng.random(2) < 0.85, GRASS, PATH).astype(np.uint8)[side]
        label = np.where(beyond < (walk + lawn)[side], np.uint8(GRASS), yard)
        label[beyond < walk[side]] = PATH
        on_road = beyond < 0
        label[on_road] = ROAD
        on_path, on_grass = label == PATH, label == GRASS

        def world(scale: int, along: float, across: float) -> np.ndarray:
            shift = rng.integers(0, _BANK, 2)
            row = (z * along + shift[0]).astype(np.int32) & (_BANK - 1)
            column = (x * across + shift[1]).astype(np.int32) & (_BANK - 1)
            return _noise()[scale].take(row * _BANK + column)

        patches, grains = world(1, 1.5, 2.0), world(0, 14.0, 24.0)
        asphalt = _rgb([1, 1, 1.02]) * np.float32(rng.uniform(82, 132))
        paving = _rgb([1.03, 1, 0.96]) * np.float32(rng.uniform(94, 158))
        green = np.array([84, 108, 50]) * self.tint * rng.uniform(0.85, 1.25)
        plain = np.zeros((GRASS + 1, 3), np.float32)
        plain[[ROAD, PATH, GRASS]] = asphalt, paving, green

        shade = 1 + np.float32(0.05) * patches + np.float32(0.10) * grains * near
        shade -= np.float32(0.05) * on_road * (np.abs(_part(x / self.half * 2) - 0.5) < 0.22)  # tyre tracks
        if rng.random() < 0.8:  # paving stones; otherwise the path is asphalt like the road
            stone = rng.uniform(0.5, 1.0)
            joint = (_part(x / stone) < 0.12) | (_part(z / stone) < 0.12)
            shade -= np.float32(0.25) * near * (joint & on_path)
        if rng.random() < 0.15:  # a cobbled road
            shift = np.float32(0.5) * (np.floor(z * 3) % 2)
            joint = (_part(z * 3) < 0.25) | (_part(x * 3 + shift) < 0.2)
            shade -= np.float32(0.28) * near * (joint & on_road)
        np.copyto(
            shade, 1 + np.float32(0.15) * patches + np.float32(0.24) * grains * near**0.5, where=on_grass
        )
        curb = (beyond >= 0) & (beyond < 0.18 + z * 0.004) & (walk > 0.5)[side]
        shade[curb] *= rng.uniform(1.1, 1.45)
        shade[(beyond < 0) & (beyond > -0.25)] *= 0.82  # the gutter
        if self.weather == "clear" and self.built[int(self.sun > 0)]:  # houses shade the street
            reach = rng.uniform(-0.6, 1.0) * self.half
            ragged = (_part(z / 17.0 + rng.uniform(0, 1)) < 0.6) * rng.uniform(0.2, 1.2)
            shade[x * self.sun > reach - ragged] *= rng.uniform(0.5, 0.7)
        colors = plain[label] * shade[..., None]

        white = np.float32(rng.uniform(165, 225))
        marks = np.zeros_like(on_road)
        if rng.random() < 0.75:
            wide = 0.09 + z * 0.0012
            dashed = rng.random() < 0.75
            marks = (np.abs(x) < wide) & ((_part(z / 6 + rng.uniform(0, 1)) < 0.5) | (not dashed))
            if rng.random() < 0.4:
                marks |= np.abs(beyond + 0.5) < wide
        if rng.random() < 0.18:  # a zebra crossing
            start = rng.uniform(7, 18)
            marks |= (z > start) & (z < start + 3) & (_part(x) < 0.5) & (beyond < -0.3)
        worn = (np.float32(0.8) + np.float32(0.2) * grains[marks]).clip(0, 1) * shade[marks]
        colors[marks] = white * worn[:, None]
        self.image[top:], self.label[top:], self.depth[top:] = colors, label, z

    def front(self, x: float, first: float, last: float, tall: float) -> tuple[Area, np.ndarray, np.ndarray]:
        """A wall along the street at x, between two distances: the area of the picture it may take, the
        distance float32 [1, w] in each of its columns, and meters above the ground float32 [h, w]."""
        camera = self.camera
        # The ray of column u meets x + bend * z * z at the distance that solves a quadratic equation.
        across = np.arange(self.width) - camera.center
        root = across**2 - 4 * camera.bend * camera.focal**2 * x
        below = across * np.sign(x) + np.sqrt(np.maximum(root, 0))
        z = 2 * camera.focal * abs(x) / np.maximum(below, 1e-3)
        met = np.flatnonzero((root >= 0) & (z > first) & (z < last))
        if not len(met):
            met = np.array([0])
            z[0] = 1e6  # behind everything
        left, right = int(met[0]), int(met[-1]) + 1
        z = z[left:right]
        rise, drop = camera.focal * (tall - camera.above) / z, camera.focal * camera.above / z
        top = int(np.clip(camera.horizon - rise.max() - 1, 0, self.height - 1))
        bottom = int(np.clip(camera.horizon + drop.max() + 2, top + 1, self.height))
        rows = (np.arange(top, bottom) - camera.horizon)[:, None]
        up = camera.above - rows * (z / camera.focal)
        return (slice(top, bottom), slice(left, right)), z[None].astype(np.float32), up.astype(np.float32)

    def houses(self, side: int) -> None:
        """A row of houses: their fronts along the street, and the gables that stick out or face a gap."""
        rng, count = self.rng, 14
        way = 2 * side - 1
        x = float(self.half + self.walks[side] + self.lawns[side] + 0.1) * way
        ends = np.cumsum(rng.uniform(6, 18, count)) - rng.uniform(0, 6)
        tall = rng.uniform(4.5, 12) * rng.uniform(0.7, 1.35, count) * (rng.random(count) < 0.9)  # 0: a gap
        paint = np.array(_FRONTS)[rng.integers(0, len(_FRONTS), count)] * rng.uniform(0.75, 1.2, (count, 1))
        brick, pitch = rng.random(count) < 0.5, rng.uniform(1.8, 3.6, count)
        for n in range(count - 1, 0, -1):
            near, high = float(ends[n - 1]), float(tall[n])
            if 2 < near < 110 and high > tall[n - 1]:
                deep, ridge = way * rng.uniform(7, 12), high + rng.uniform(0.0, 2.5)
                corners = [(x, 0.0, near), (x, high, near), (x + deep / 2, ridge, near)]
                corners += [(x + deep, high, near), (x + deep, 0.0, near)]
                self.paint([(corners, _scaled(paint[n], 0.9))], BUILDING, near)

        area, z, up = self.front(x, 1.5, 120.0, float(tall.max()))
        house = np.minimum(np.searchsorted(ends, z[0]), count - 1)
        roof = tall[house].astype(np.float32)[None]
        height, width = up.shape
        near = (14.0 / z).clip(0, 1) ** 1.5
        course = np.floor(up * 5)
        joint = (up * 5 - course < 0.3) | (_part(z * 2.5 + np.float32(0.5) * (course % 2)) < 0.15)
        shade = 1 + np.float32(0.06) * self.crop(1, height, width)
        shade -= np.float32(0.22) * near * (joint & brick[house])
        shade[up < 0.7] *= 0.85

        cell_z, cell_up = z / pitch[house].astype(np.float32), (up - 0.4) / 2.9
        part_z, part_up = _part(cell_z), _part(cell_up)
        walled = (up < roof - 0.5) & (up > 0.4)
        frame = (part_z > 0.22) & (part_z < 0.78) & (part_up > 0.25) & (part_up < 0.87) & walled
        glass = (part_z > 0.28) & (part_z < 0.72) & (part_up > 0.3) & (part_up < 0.82) & walled
        shade[frame] *= 1.15
        shade[up > roof - 0.35] *= 0.6  # the eaves
        sunny = 1.12 if way * self.sun < 0 else 0.82
        colors = (paint * sunny).astype(np.float32)[house][None] * shade[..., None]
        # One number for each window.
        dice = _noise()[0][cell_z[0].clip(0, 300).astype(int), cell_up.clip(-1, 9).astype(int) + 1]
        pane = _rgb([52, 60, 70])
        colors[glass] = pane * (1 + np.float32(0.25) * dice[glass])[:, None]
        for _ in range(rng.poisson(0.9)):  # posters with the colors of sign plates
            start, low = rng.uniform(8, 45), rng.uniform(1.0, 3.0)
            poster = (z > start) & (z < start + rng.uniform(0.8, 2.2)) & (up > low)
            poster &= up < low + rng.uniform(0.6, 1.3)
            colors[poster] = _PLATES[rng.integers(len(_PLATES))]
        seen = self.cover(area, (up >= 0) & (up < roof), colors, BUILDING, z)
        if self.weather == "night":
            self.glow[area][seen & glass & (dice > 0.5)] = (150, 120, 70)

    def hedge(self, side: int) -> None:
        rng = self.rng
        x = float(self.half + self.walks[side] + 0.4 * self.lawns[side] + 0.2) * (2 * side - 1)
        start, tall = rng.uniform(4, 25), rng.uniform(0.7, 1.7)
        area, z, up = self.front(x, start, start + rng.uniform(6, 40), tall + 0.4)
        where = (up >= -0.05) & (up < tall + np.float32(0.12) * self.crop(1, *up.shape))
        light = np.float32(0.75) + np.float32(0.25) * up.clip(0, 1.5)
        self.cover(area, where, self.leaves(*up.shape) * light[..., None], VEGETATION, z)

    # Things that stand on the ground

    def things(self) -> list[tuple[float, functools.partial[None]]]:
        """(distance, how to draw it) of all that stands on the ground, in any order."""
        rng, half = self.rng, self.half
        found: list[tuple[float, functools.partial[None]]] = []

        def spot(low: float, high: float) -> float:
            return float(np.exp(rng.uniform(np.log(low), np.log(high))))

        def kind() -> int:
            return VAN if rng.random() < 0.2 else CAR

        for _ in range(rng.poisson(0.9)):  # on their way
            lane, z = float(rng.choice([-0.5, 0.5])) * half + rng.normal(0, 0.3), spot(8, 60)
            found.append((z, functools.partial(self.vehicle, lane, z, kind(), False)))
        for side in (-1, 1):  # at the curb
            if rng.random() < 0.5:
                z = rng.uniform(6, 26)
                while z < 60:
                    if rng.random() < 0.55:
                        where = side * (half - 1.1 + rng.normal(0, 0.12))
                        found.append((z, functools.partial(self.vehicle, where, z, kind(), False)))
                    z += rng.uniform(6.0, 9.0)
        if rng.random() < 0.15:  # crossing
            z = spot(12, 30)
            where = rng.uniform(-half, half)
            found.append((z, functools.partial(self.vehicle, where, z, kind(), True)))

        for _ in range(rng.poisson(1.3)):
            z = spot(11, 55)
            side = int(rng.integers(2))
            if rng.random() < 0.8:
                x = (half + max(self.walks[side], 1.0) * rng.uniform(0.2, 0.9)) * (2 * side - 1)
            else:
                x = rng.uniform(-half, half)
            found.append((z, functools.partial(self.person, x, z)))

        for side in (0, 1):
            way = 2 * side - 1
            if rng.random() < 0.55:
                z, gap, tall = rng.uniform(9, 26), rng.uniform(14, 26), rng.uniform(5, 8)
                arm = -way * rng.uniform(0.8, 1.8) if rng.random() < 0.7 else 0.0
                while z < 75:
                    found.append((z, functools.partial(self.pole, way * (half + 0.5), z, tall, arm)))
                    z += gap
            if rng.random() < 0.18:
                z = spot(21, 50)
                found.append((z, functools.partial(self.sign, way * (half + rng.uniform(0.3, 1.0)), z)))
            trees = rng.random() < (0.3 if self.built[side] else 0.75)
            for _ in range(rng.poisson(3) if trees else 0):
                z = spot(10, 70)
                x = way * (half + self.walks[side] + rng.uniform(0.2, 1.0))
                if not self.built[side]:
                    x += way * rng.exponential(4.0)
                found.append((z, functools.partial(self.tree, x, z)))
        return found

    def paint(self, shapes: Sequence[Shape], label: int, z: float) -> None:
        """Fill polygons one over the other, where nothing nearer stands."""
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
        # The ground just in front of its foot is a little nearer than the thing itself.
        seen = (mask > 0) & (self.depth[area] > 0.9 * z - 0.3)
        np.copyto(self.image[area], patch, where=seen[..., None])
        self.label[area][seen] = label
        self.depth[area][seen] = z
        self.glow[area][seen] = 0  # of lamps behind

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

    def vehicle(self, x: float, z: float, kind: int, crossing: bool) -> None:
        """A car or a van, seen from behind or in front, or from the side when `crossing`."""
        rng, camera = self.rng, self.camera
        paint = _PAINTS[rng.choice(8, p=_VAN_PAINT if kind == VAN else _CAR_PAINT)]
        paint = _scaled(paint, rng.uniform(0.85, 1.1))
        glass = _scaled((44, 52, 62), rng.uniform(0.7, 1.4))
        if kind == VAN:
            wide, long = rng.uniform(1.85, 2.1), rng.uniform(4.6, 5.8)
            belt, roof = rng.uniform(1.1, 1.3), rng.uniform(1.95, 2.5)
            cabin = (0.02, 0.86)  # where along the length the upper part begins and ends
        else:
            wide, long = rng.uniform(1.65, 1.85), rng.uniform(3.7, 4.6)
            belt, roof = rng.uniform(0.82, 0.95), rng.uniform(1.38, 1.62)
            cabin = (rng.uniform(0.03, 0.2), rng.uniform(0.66, 0.76))
        toward = rng.random() < 0.4
        if toward:
            cabin = (1 - cabin[1], 1 - cabin[0])
        inset = 0.04 if kind == VAN else 0.2
        slope = 0.05 if kind == VAN else 0.4  # meters the windscreens lean

        # From (across, up, along) in the vehicle's own frame, along from 0 to `long`.
        def place(points: Sequence[Point]) -> list[Point]:
            if crossing:
                return [(x + a - long / 2, u, z + wide / 2 - s) for s, u, a in points]
            return [(x + s, u, z + a) for s, u, a in points]

        def mix(first: float, last: float, share: float) -> float:
            return first + (last - first) * share

        w, front, back = wide / 2, cabin[0] * long, cabin[1] * long
        v, rear, fore = w - inset, front + slope, back - slope
        low, at, to = 0.3, mix(belt, roof, 0.12), mix(belt, roof, 0.86)
        # The side that is seen: the one toward the middle of the picture, or the near one when crossing.
        seen = 1.0 if crossing or x + camera.bend * z * z < 0 else -1.0
        a, b = seen * w, seen * v
        side_paint = _scaled(paint, 0.62 if (seen > 0) == (self.sun < 0) else 0.9)
        end_paint, top_paint = _scaled(paint, 0.78), _scaled(paint, 1.12)
        dark: Color = (24.0, 24.0, 26.0)

        side: list[Shape] = [
            (place([(a, low, 0), (a, belt, 0), (a, belt, long), (a, low, long)]), side_paint),
            (place([(a, belt, front), (b, roof, rear), (b, roof, fore), (a, belt, back)]), side_paint),
        ]
        side += [
            (place([(a, 0.32 + 0.32 * s, along + 0.33 * c) for s, c in _circle(10)]), dark)
            for along in (0.19 * long, 0.8 * long)
        ]
        panes = [(0.1, 0.48), (0.54, 0.9)]
        if kind == VAN:  # only the driver has a window
            panes = [(0.08, 0.3)] if toward else [(0.7, 0.93)]
        s_low, s_top = mix(a, b, 0.12), mix(a, b, 0.86)
        for first, last in panes:
            low_near, low_far = mix(front, back, first), mix(front, back, last)
            top_near, top_far = mix(rear, fore, first), mix(rear, fore, last)
            corners = [
                (s_low, at, low_near),
                (s_top, to, top_near),
                (s_top, to, top_far),
                (s_low, at, low_far),
            ]
            side.append((place(corners), glass))
        tops: list[Shape] = [
            (place([(-w, belt, 0), (w, belt, 0), (w, belt, long), (-w, belt, long)]), top_paint)
        ]
        if camera.above > roof:
            corners = [(-v, roof, rear), (v, roof, rear), (v, roof, fore), (-v, roof, fore)]
            side.append((place(corners), top_paint))
        footprint = [
            (-w - 0.15, 0.0, -0.3),
            (w + 0.15, 0.0, -0.3),
            (w + 0.15, 0.0, long),
            (-w - 0.15, 0.0, long),
        ]
        cast = 0.5 * self.sun * (self.weather == "clear" and not crossing)
        self.shadow([(px - cast, 0.0, pz) for px, _, pz in place(footprint)], 0.5)
        if crossing:
            self.paint(tops + side, kind, z)
            return

        def box(middle: float, half: float, bottom: float, top: float, along: float) -> list[Point]:
            left, right = middle - half, middle + half
            return place(
                [(left, bottom, along), (left, top, along), (right, top, along), (right, bottom, along)]
            )

        feet: list[Shape] = [(box(s * (w - 0.15), 0.12, 0.0, 0.4, 0.3), dark) for s in (-1, 1)]
        end: list[Shape] = [
            (box(0, w, low, belt, 0), end_paint),
            (place([(-w, belt, front), (-v, roof, rear), (v, roof, rear), (w, belt, front)]), end_paint),
        ]
        if kind == CAR or toward or rng.random() < 0.6:
            lower_at, upper_at = mix(front, rear, 0.12), mix(front, rear, 0.86)
            p, q = 0.82 * w, 0.86 * v
            corners = [(-p, at, lower_at), (-q, to, upper_at), (q, to, upper_at), (p, at, lower_at)]
            end.append((place(corners), glass))
        lamps: Color = (235.0, 232.0, 205.0) if toward else (170.0, 26.0, 24.0)
        end += [(box(s * (w - 0.22), 0.16, 0.6, 0.78, 0), lamps) for s in (-1, 1)]
        self.paint(feet + tops + side + end, kind, z)
        if self.weather == "night":
            for s in (-1, 1):
                self.shine((x + s * (w - 0.22), 0.69, z), 0.35, (255, 240, 190) if toward else (150, 20, 15))

    def person(self, x: float, z: float) -> None:
        rng = self.rng
        tall, width = rng.uniform(1.5, 1.9), rng.uniform(0.2, 0.3)
        coat, legs = (_scaled(_CLOTHES[rng.integers(len(_CLOTHES))], rng.uniform(0.8, 1.2)) for _ in range(2))
        skin = _scaled((205, 160, 130), rng.uniform(0.45, 1.05))
        stride, lean = rng.uniform(0.02, 0.3), rng.normal(0, 0.05)

        def flat(*points: tuple[float, float]) -> list[Point]:
            return [(x + s, u * tall, z) for s, u in points]

        shapes: list[Shape] = [
            (flat((-0.02, 0.5), (0.14, 0.5), (stride + 0.06, 0), (stride - 0.08, 0)), legs),
            (flat((-0.14, 0.5), (0.02, 0.5), (0.08 - stride, 0), (-0.06 - stride, 0)), _scaled(legs, 0.8)),
            (flat((-width, 0.82), (width, 0.82), (width * 0.75, 0.46), (-width * 0.75, 0.46)), coat),
            (flat(*((lean + 0.11 * c, 0.92 + 0.07 * s) for s, c in _circle(8))), skin),
        ]
        self.shadow([(x - 0.3, 0.0, z - 0.1), (x + 0.3, 0.0, z - 0.1), (x - self.sun, 0.0, z + 0.6)], 0.35)
        self.paint(shapes, PERSON, z)

    def post(self, x: float, z: float, tall: float) -> Shape:
        """The same for lamps and signs."""
        corners = [(x - 0.07, 0.0, z), (x + 0.07, 0.0, z), (x + 0.07, tall, z), (x - 0.07, tall, z)]
        return corners, _scaled((118, 120, 122), self.rng.uniform(0.5, 1.3))

    def pole(self, x: float, z: float, tall: float, arm: float) -> None:
        """A lamp post, or a plain one where `arm` (meters across) is 0."""
        shapes = [self.post(x, z, tall)]
        if arm:
            tone, end = shapes[0][1], x + arm
            top, left, right = tall + 0.25, end - 0.3, end + 0.3
            shapes.append(
                ([(x, tall, z), (end, tall + 0.2, z), (end, tall + 0.3, z), (x, tall + 0.1, z)], tone)
            )
            head = [(left, tall, z), (right, tall, z), (right, top, z), (left, top, z)]
            shapes.append((head, _scaled(tone, 1.2)))
        self.paint(shapes, POLE, z)
        if arm and self.weather == "night":
            self.shine((x + arm, tall, z), 0.8, (255, 215, 150))

    def sign(self, x: float, z: float) -> None:
        """A traffic sign with its post: triangle, rectangle or disc."""
        rng = self.rng
        tall, radius = rng.uniform(2.1, 2.7), rng.uniform(0.3, 0.42)
        corners = int(rng.choice([3, 4, 10]))
        turned = math.pi / 2 if corners == 3 else math.pi / 4

        def plate(size: float) -> list[Point]:
            return [(x + size * c, tall + size * s, z) for s, c in _circle(corners, turned)]

        rim, inner = (_PLATES[n] for n in rng.permutation(len(_PLATES))[:2])
        self.paint([self.post(x, z, tall), (plate(radius), rim), (plate(radius * 0.6), inner)], SIGN, z)

    def tree(self, x: float, z: float) -> None:
        rng, camera = self.rng, self.camera
        trunk, radius = rng.uniform(1.6, 3.0), rng.uniform(1.2, 2.6)
        bark = _scaled((84, 68, 54), rng.uniform(0.6, 1.2))
        stem = [(x - 0.15, 0.0, z), (x + 0.15, 0.0, z), (x + 0.1, trunk + 1, z), (x - 0.1, trunk + 1, z)]
        if self.weather == "clear":
            cast = x - 1.5 * self.sun
            self.shadow([(cast + radius * c, 0.0, z + radius * s) for s, c in _circle(12)], 0.35)
        self.paint([(stem, bark)], VEGETATION, z)

        (cx, cy), size = camera.project([(x, trunk + 0.8 * radius, z)])[0], radius * camera.pixels(z)
        left, right = max(int(cx - 1.5 * size), 0), min(int(cx + 1.5 * size) + 1, self.width)
        top, bottom = max(int(cy - 1.5 * size), 0), min(int(cy + 1.5 * size) + 1, self.height)
        if left >= right or top >= bottom:
            return
        height, width = bottom - top, right - left
        dy = ((np.arange(top, bottom) - cy) / size)[:, None].astype(np.float32)
        dx = ((np.arange(left, right) - cx) / size)[None].astype(np.float32)
        lumps = self.crop(1, height, width) + np.float32(0.5) * self.crop(0, height, width)
        crown = dx**2 + dy**2 * np.float32(1.1) + np.float32(0.22) * lumps < 1
        light = (np.float32(0.95) - np.float32(0.28) * dy + np.float32(0.22 * self.sun) * dx)[..., None]
        colors = self.leaves(height, width) * (light * np.float32(rng.uniform(0.75, 1.2)))
        self.cover((slice(top, bottom), slice(left, right)), crown, colors, VEGETATION, z)

    def shine(self, lamp: Point, radius: float, color: Color) -> None:
        """A lamp of that radius in meters that glows at night; call it when its thing is painted."""
        x, y = (round(float(part)) for part in self.camera.project([lamp])[0])
        in_view = 0 <= x < self.width and 0 <= y < self.height
        if in_view and self.depth[y, x] > 0.9 * lamp[2] - 0.3:
            cv2.circle(self.glow, (x, y), max(1, round(radius * self.camera.pixels(lamp[2]))), color, -1)

    # Light and lens

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Put air, light, lens and sensor in front of the picture: image and label as in draw_scene."""
        rng, image = self.rng, self.image
        height, width = self.height, self.width
        night = self.weather == "night"
        gain = {"clear": (0.85, 1.2), "overcast": (0.7, 1.05), "fog": (0.75, 1.0), "night": (0.3, 0.5)}
        slant = np.linspace(-1, 1, width) * rng.uniform(0, 0.2) * self.sun
        down = np.linspace(-1, 1, height) * rng.normal(0, 0.08)
        light = ((1 + slant[None] + down[:, None]) * rng.uniform(*gain[self.weather])).astype(np.float32)
        warmth = rng.normal(0, 0.06) - (0.08 if night else 0)
        temperature = _rgb([1 + warmth, 1.0, 1 - warmth])
        grain = 1 + _GRAIN[self.label] * self.crop(0, height, width)
        thick = rng.uniform(0.012, 0.04) if self.weather == "fog" else rng.uniform(0.0005, 0.003)
        through = np.exp(np.float32(-thick) * np.minimum(self.depth, 200.0)) * np.float32(1)
        through[self.label == SKY] = 1
        # haze + (color * grain - haze) * through, all in this light
        haze = _rgb([200, 202, 205]) * temperature * np.float32(0.3 if night else 1.0)
        image = (
            image * (temperature * (grain * through * light)[..., None])
            + haze * ((1 - through) * light)[..., None]
        )
        if night:
            small = cv2.resize(self.glow, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            halo = cv2.resize(cv2.GaussianBlur(small, (0, 0), 4.0), (width, height))
            image += np.float32(0.7) * self.glow + halo + np.float32(0.006) * halo * image

        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.35, 0.85))
        # Sensor noise grows with the square root of the light; dark scenes are taken at a higher gain.
        rough = np.float32(rng.uniform(1.0, 3.0) * (2.0 if night else 1.0))
        np.clip(image, 0, 255, out=image)
        image += self.crop(3, height, width) * (
            rough * np.sqrt(np.float32(0.4) + image * np.float32(1 / 160))
        )
        pixels = np.rint(image.clip(0, 255)).astype(np.uint8)

        vehicles = ((self.label == CAR) | (self.label == VAN)).astype(np.uint8)
        rim = cv2.dilate(vehicles, np.ones((3, 3), np.uint8)) > vehicles
        rim &= self.label < PERSON  # thin things keep all their pixels
        label = self.label.copy()
        label[rim] = IGNORE
        return pixels, label
