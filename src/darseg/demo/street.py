"""The street of a drawn scene: sky, skyline, ground, houses and hedges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from darseg.demo.canvas import (
    BANK,
    BUILDING,
    FRONTS,
    GRASS,
    PATH,
    PLATES,
    ROAD,
    VEGETATION,
    Area,
    Canvas,
    noise,
    part,
    rgb,
    scaled,
)

FAR = 160.0
"""Meters; the ground ends here."""


def draw_sky(canvas: Canvas) -> None:
    """The sky, with clouds."""
    base = {
        "clear": ((92, 142, 205), (196, 214, 226)),
        "overcast": ((168, 174, 182), (206, 208, 210)),
        "fog": ((188, 190, 192), (204, 205, 206)),
        "night": ((70, 84, 120), (120, 118, 128)),
    }[canvas.weather]
    bottom = int(canvas.camera.horizon) + 1
    zenith, haze = np.array(base, np.float32) * np.float32(canvas.rng.uniform(0.9, 1.08))
    rise = np.linspace(0, 1.1, bottom, dtype=np.float32).clip(0, 1)[:, None, None]
    colors = zenith + (haze - zenith) * rise
    cover = canvas.rng.uniform(-0.9, 0.7)
    clouds = canvas.crop(2, bottom, canvas.width) + np.float32(0.3) * canvas.crop(1, bottom, canvas.width)
    amount = ((clouds + np.float32(cover)) * np.float32(0.5)).clip(0, 0.8)[..., None]
    canvas.image[:bottom] = colors + (np.float32(232) - colors) * amount


def draw_skyline(canvas: Canvas) -> None:
    """Far roofs and trees along the horizon."""
    rng, camera = canvas.rng, canvas.camera
    bottom = int(camera.horizon) + 1
    top = max(bottom - int(camera.pixels(100.0) * 26) - 1, 0)
    area = (slice(top, bottom), slice(0, canvas.width))
    rows, columns = np.arange(top, bottom)[:, None], np.arange(canvas.width)
    edges = np.sort(rng.uniform(0, canvas.width, 9))
    steps = rng.uniform(3, 26, 10) * (rng.random(10) < 0.75)
    tones = np.array(FRONTS, np.float32)[rng.integers(0, len(FRONTS), 10)]
    block = np.searchsorted(edges, columns)
    shade = 1 + np.float32(0.08) * canvas.crop(1, bottom - top, canvas.width)
    shade -= np.float32(0.2) * ((rows % 3 == 0) & (columns % 3 > 0))
    roofs = rows > camera.horizon - camera.pixels(130.0) * steps[block]
    canvas.cover(area, roofs, tones[block][None] * shade[..., None], label=BUILDING, depth=130.0)
    waves = canvas.crop(2, 1, canvas.width)[0] + 0.5 * canvas.crop(0, 1, canvas.width)[0]
    crowns = rows > camera.horizon - camera.pixels(100.0) * (rng.uniform(1.0, 6.0) + 2.5 * waves)
    canvas.cover(area, crowns, canvas.leaves(bottom - top, canvas.width), label=VEGETATION, depth=100.0)


@dataclass(frozen=True)
class _Ground:
    """The visible part of the ground; all arrays [h, w], for the rows from `top` on.

    Attributes:
        x, z: meters right of the middle of the street, and ahead.
        near: 1 close to the viewer, falling with distance: detail is lost far away.
        side: 0 left, 1 right.
        beyond: meters from the curb, negative on the road.
        label: classes.
        patches, grains: noise that lies on the ground, coarser toward the viewer.
    """

    top: int
    x: np.ndarray
    z: np.ndarray
    near: np.ndarray
    side: np.ndarray
    beyond: np.ndarray
    label: np.ndarray
    patches: np.ndarray
    grains: np.ndarray


def draw_ground(canvas: Canvas) -> None:
    """Road, sidewalks, lawns and yards, with their paving, shadows of houses, and road markings."""
    view = _cast_ground(canvas)
    plain = _materials(canvas)
    shade = _ground_shade(canvas, view)
    colors = plain[view.label] * shade[..., None]
    white, marks = _road_marks(canvas.rng, view)
    worn = (np.float32(0.8) + np.float32(0.2) * view.grains[marks]).clip(0, 1) * shade[marks]
    colors[marks] = white * worn[:, None]
    rows = slice(view.top, None)
    canvas.image[rows], canvas.label[rows], canvas.depth[rows] = colors, view.label, view.z


def _cast_ground(canvas: Canvas) -> _Ground:
    """Where the ray of each pixel below the horizon meets the ground, and what is there."""
    rng, camera = canvas.rng, canvas.camera
    top = int(camera.horizon) + 1
    rows = np.arange(top, canvas.height, dtype=np.float32)[:, None]
    columns = np.arange(canvas.width, dtype=np.float32)[None]
    z = np.minimum(camera.focal * camera.above / (rows - camera.horizon), FAR)
    x = (columns - camera.center) * (z / camera.focal) - camera.bend * z * z

    side = (x > 0).astype(np.intp)
    beyond = np.abs(x) - canvas.half
    walk, lawn = canvas.walks.astype(np.float32), canvas.lawns.astype(np.float32)
    # Behind path and lawn lies the yard: usually grass, sometimes paved.
    yard = np.where(rng.random(2) < 0.85, GRASS, PATH).astype(np.uint8)[side]
    label = np.where(beyond < (walk + lawn)[side], np.uint8(GRASS), yard)
    label[beyond < walk[side]] = PATH
    label[beyond < 0] = ROAD

    def texture(scale: int, along: float, across: float) -> np.ndarray:
        shift = rng.integers(0, BANK, 2)
        row = (z * along + shift[0]).astype(np.int32) & (BANK - 1)
        column = (x * across + shift[1]).astype(np.int32) & (BANK - 1)
        return noise()[scale].take(row * BANK + column)

    return _Ground(
        top=top,
        x=x,
        z=z,
        near=(10.0 / z).clip(0, 1),
        side=side,
        beyond=beyond,
        label=label,
        patches=texture(1, 1.5, 2.0),
        grains=texture(0, 14.0, 24.0),
    )


def _materials(canvas: Canvas) -> np.ndarray:
    """Plain colors of road, path and grass, float32 [classes, 3]."""
    rng = canvas.rng
    asphalt = rgb([1, 1, 1.02]) * np.float32(rng.uniform(82, 132))
    paving = rgb([1.03, 1, 0.96]) * np.float32(rng.uniform(94, 158))
    green = np.array([84, 108, 50]) * canvas.tint * rng.uniform(0.85, 1.25)
    plain = np.zeros((GRASS + 1, 3), np.float32)
    plain[[ROAD, PATH, GRASS]] = asphalt, paving, green
    return plain


def _ground_shade(canvas: Canvas, view: _Ground) -> np.ndarray:
    """Lightness of the ground, float32 [h, w]: paving, tire tracks, curbs and shadows of houses."""
    rng, x, z, near, beyond = canvas.rng, view.x, view.z, view.near, view.beyond
    on_road, on_path, on_grass = beyond < 0, view.label == PATH, view.label == GRASS
    shade = 1 + np.float32(0.05) * view.patches + np.float32(0.10) * view.grains * near
    shade -= np.float32(0.05) * on_road * (np.abs(part(x / canvas.half * 2) - 0.5) < 0.22)  # tire tracks
    if rng.random() < 0.8:  # paving stones; otherwise the path is asphalt like the road
        stone = rng.uniform(0.5, 1.0)
        joint = (part(x / stone) < 0.12) | (part(z / stone) < 0.12)
        shade -= np.float32(0.25) * near * (joint & on_path)
    if rng.random() < 0.15:  # a cobbled road
        shift = np.float32(0.5) * (np.floor(z * 3) % 2)
        joint = (part(z * 3) < 0.25) | (part(x * 3 + shift) < 0.2)
        shade -= np.float32(0.28) * near * (joint & on_road)
    lawn = 1 + np.float32(0.15) * view.patches + np.float32(0.24) * view.grains * near**0.5
    np.copyto(shade, lawn, where=on_grass)
    has_walk = (canvas.walks.astype(np.float32) > 0.5)[view.side]
    curb = (beyond >= 0) & (beyond < 0.18 + z * 0.004) & has_walk
    shade[curb] *= rng.uniform(1.1, 1.45)
    shade[(beyond < 0) & (beyond > -0.25)] *= 0.82  # the gutter
    if canvas.weather == "clear" and canvas.built[int(canvas.sun > 0)]:  # houses shade the street
        reach = rng.uniform(-0.6, 1.0) * canvas.half
        ragged = (part(z / 17.0 + rng.uniform(0, 1)) < 0.6) * rng.uniform(0.2, 1.2)
        shade[x * canvas.sun > reach - ragged] *= rng.uniform(0.5, 0.7)
    return shade


def _road_marks(rng: np.random.Generator, view: _Ground) -> tuple[np.float32, np.ndarray]:
    """How white the markings are, and where they lie, bool [h, w]: lines and a zebra crossing."""
    x, z, beyond = view.x, view.z, view.beyond
    white = np.float32(rng.uniform(165, 225))
    marks = np.zeros(beyond.shape, bool)
    if rng.random() < 0.75:
        wide = 0.09 + z * 0.0012
        dashed = rng.random() < 0.75
        marks = (np.abs(x) < wide) & ((part(z / 6 + rng.uniform(0, 1)) < 0.5) | (not dashed))
        if rng.random() < 0.4:
            marks |= np.abs(beyond + 0.5) < wide
    if rng.random() < 0.18:
        start = rng.uniform(7, 18)
        marks |= (z > start) & (z < start + 3) & (part(x) < 0.5) & (beyond < -0.3)
    return white, marks


def _front(
    canvas: Canvas, x: float, *, first: float, last: float, tall: float
) -> tuple[Area, np.ndarray, np.ndarray]:
    """Where a wall along the street appears in the picture.

    Args:
        x: meters right of the middle of the street.
        first, last: distances in meters at which the wall begins and ends.
        tall: its height in meters.

    Returns:
        the area it may take, the distance of each of its columns, float32 [1, w], and the height above the ground of
        each pixel, float32 [h, w]; both in meters.
    """
    camera = canvas.camera
    # The ray of column u meets x + bend * z * z at the distance that solves a quadratic equation.
    across = np.arange(canvas.width) - camera.center
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
    top = int(np.clip(camera.horizon - rise.max() - 1, 0, canvas.height - 1))
    bottom = int(np.clip(camera.horizon + drop.max() + 2, top + 1, canvas.height))
    rows = (np.arange(top, bottom) - camera.horizon)[:, None]
    up = camera.above - rows * (z / camera.focal)
    return (slice(top, bottom), slice(left, right)), z[None].astype(np.float32), up.astype(np.float32)


def draw_houses(canvas: Canvas, side: int) -> None:
    """A row of houses: fronts along the street, and gables that stick out or face a gap."""
    rng, count = canvas.rng, 14
    way = 2 * side - 1
    x = float(canvas.half + canvas.walks[side] + canvas.lawns[side] + 0.1) * way
    ends = np.cumsum(rng.uniform(6, 18, count)) - rng.uniform(0, 6)
    tall = rng.uniform(4.5, 12) * rng.uniform(0.7, 1.35, count) * (rng.random(count) < 0.9)  # 0 is a gap
    paint = np.array(FRONTS)[rng.integers(0, len(FRONTS), count)] * rng.uniform(0.75, 1.2, (count, 1))
    brick, pitch = rng.random(count) < 0.5, rng.uniform(1.8, 3.6, count)
    for n in range(count - 1, 0, -1):
        near, high = float(ends[n - 1]), float(tall[n])
        if 2 < near < 110 and high > tall[n - 1]:
            deep, ridge = way * rng.uniform(7, 12), high + rng.uniform(0.0, 2.5)
            corners = [(x, 0.0, near), (x, high, near), (x + deep / 2, ridge, near)]
            corners += [(x + deep, high, near), (x + deep, 0.0, near)]
            canvas.paint([(corners, scaled(paint[n], 0.9))], BUILDING, near)

    area, z, up = _front(canvas, x, first=1.5, last=120.0, tall=float(tall.max()))
    house = np.minimum(np.searchsorted(ends, z[0]), count - 1)
    roof = tall[house].astype(np.float32)[None]
    height, width = up.shape
    near = (14.0 / z).clip(0, 1) ** 1.5
    course = np.floor(up * 5)
    joint = (up * 5 - course < 0.3) | (part(z * 2.5 + np.float32(0.5) * (course % 2)) < 0.15)
    shade = 1 + np.float32(0.06) * canvas.crop(1, height, width)
    shade -= np.float32(0.22) * near * (joint & brick[house])
    shade[up < 0.7] *= 0.85

    cell_z, cell_up = z / pitch[house].astype(np.float32), (up - 0.4) / 2.9
    part_z, part_up = part(cell_z), part(cell_up)
    walled = (up < roof - 0.5) & (up > 0.4)
    frame = (part_z > 0.22) & (part_z < 0.78) & (part_up > 0.25) & (part_up < 0.87) & walled
    glass = (part_z > 0.28) & (part_z < 0.72) & (part_up > 0.3) & (part_up < 0.82) & walled
    shade[frame] *= 1.15
    shade[up > roof - 0.35] *= 0.6  # the eaves
    sunny = 1.12 if way * canvas.sun < 0 else 0.82
    colors = (paint * sunny).astype(np.float32)[house][None] * shade[..., None]
    # One random number for each window.
    dice = noise()[0][cell_z[0].clip(0, 300).astype(int), cell_up.clip(-1, 9).astype(int) + 1]
    pane = rgb([52, 60, 70])
    colors[glass] = pane * (1 + np.float32(0.25) * dice[glass])[:, None]
    for _ in range(rng.poisson(0.9)):  # posters with the colors of sign plates
        start, low = rng.uniform(8, 45), rng.uniform(1.0, 3.0)
        poster = (z > start) & (z < start + rng.uniform(0.8, 2.2)) & (up > low)
        poster &= up < low + rng.uniform(0.6, 1.3)
        colors[poster] = PLATES[rng.integers(len(PLATES))]
    seen = canvas.cover(area, (up >= 0) & (up < roof), colors, label=BUILDING, depth=z)
    if canvas.weather == "night":
        canvas.glow[area][seen & glass & (dice > 0.5)] = (150, 120, 70)


def draw_hedge(canvas: Canvas, side: int) -> None:
    """A hedge along the street."""
    rng = canvas.rng
    x = float(canvas.half + canvas.walks[side] + 0.4 * canvas.lawns[side] + 0.2) * (2 * side - 1)
    start, tall = rng.uniform(4, 25), rng.uniform(0.7, 1.7)
    area, z, up = _front(canvas, x, first=start, last=start + rng.uniform(6, 40), tall=tall + 0.4)
    where = (up >= -0.05) & (up < tall + np.float32(0.12) * canvas.crop(1, *up.shape))
    light = np.float32(0.75) + np.float32(0.25) * up.clip(0, 1.5)
    canvas.cover(area, where, canvas.leaves(*up.shape) * light[..., None], label=VEGETATION, depth=z)
