"""Drawn street scenes with exact labels: a small long-tailed data set that needs no download.

A scene is a pinhole view along a street. Ground and house fronts are ray-cast, so their textures get coarser toward the
viewer. Things that stand on the ground are drawn from far to near, so near things hide far ones. Label and picture come
from the same shapes; lighting, fog, blur and sensor noise change only the picture.

Color does not distinguish some classes. They differ only by

    road / path           place, curb and paving pattern (either may be asphalt)
    vegetation / grass    texture and shape (a hedge has the color of a lawn)
    car / van             shape (the paints are the same)
    pole / sign           the plate, a few pixels, and the height (the posts are the same)
    sign / building       place (posters on house fronts have the colors of plates)

The pixels of a scene depend only on its seed and index, not on which scenes were drawn before.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import cv2
import numpy as np

from darseg.data.classes import IGNORE
from darseg.data.files import storage_error, write_whole
from darseg.data.maps import write_map
from darseg.demo.canvas import CAR, PERSON, SIDES, SKY, VAN, Canvas, rgb
from darseg.demo.canvas import SCENE_CLASSES as SCENE_CLASSES
from darseg.demo.street import draw_ground, draw_hedge, draw_houses, draw_sky, draw_skyline
from darseg.demo.things import draw_person, draw_pole, draw_sign, draw_tree
from darseg.demo.vehicles import draw_vehicle
from darseg.errors import DataError, SizeError

VERSION = 1
"""Increased with every change that alters a pixel, so that existing sets are drawn again."""

MARKER = "scenes.json"
"""Written last, so a set is complete if it is there and describes the set."""

GRAIN = np.array([0.008, 0.05, 0.05, 0.04, 0.08, 0.08, 0.03, 0.03, 0.06, 0.03, 0.03], np.float32)
"""How strongly fine grain changes each class; leaves and lawn also get grain when they are drawn."""


def draw_scene(seed: int, index: int, size: tuple[int, int] = (129, 193)) -> tuple[np.ndarray, np.ndarray]:
    """Draw scene `index` of the set `seed`.

    Args:
        seed, index: 0 or more.
        size: height and width in pixels, each from 65 to 385.

    Returns:
        the image, uint8 [H, W, 3] RGB, and its label, uint8 [H, W]: indices into SCENE_CLASSES, and 255 along the
        outlines of vehicles.

    Raises SizeError for a side outside the range, DataError for a negative seed or index.
    """
    height, width = size
    if not all(SIDES[0] <= side <= SIDES[1] for side in size):
        raise SizeError(
            f"A scene of {height} x {width} pixels cannot be drawn: both sides must be from {SIDES[0]} to {SIDES[1]}. "
            "The usual size is 129 x 193."
        )
    if seed < 0 or index < 0:
        raise DataError(f"Scene {index} of seed {seed} cannot be drawn: both numbers must be 0 or more.")
    canvas = Canvas(np.random.default_rng([seed, index]), height, width)
    draw_sky(canvas)
    draw_skyline(canvas)
    draw_ground(canvas)
    for side in (0, 1):
        if canvas.built[side]:
            draw_houses(canvas, side)
        if canvas.rng.random() < (0.12 if canvas.built[side] else 0.6):
            draw_hedge(canvas, side)
    things = [*_vehicles(canvas), *_people(canvas), *_street_furniture(canvas)]
    for _, draw in sorted(things, key=lambda thing: -thing[0]):  # far things first
        draw()
    return _photograph(canvas)


def write_scenes(root: Path, *, labeled: int, unlabeled: int, validation: int, seed: int) -> None:
    """Draw a data set into `root`: images/*.png, labels/*.png and three lists of ids.

    labeled.txt, unlabeled.txt and validation.txt hold one id per line. Unlabeled scenes get label maps too, to measure
    pseudo labels with. Validation scenes are numbered first and labeled ones next, so sets that differ only in the later
    counts share the earlier scenes. A complete set of the same seed, counts and drawing version is left alone; any other
    set is overwritten.

    Raises DataError if a count or the seed is out of range, StorageError if the folder cannot be written.
    """
    if labeled < 1 or unlabeled < 0 or validation < 0 or seed < 0:
        raise DataError(
            f"Scenes with labeled={labeled}, unlabeled={unlabeled}, validation={validation}, seed={seed} cannot be "
            "drawn: at least 1 labeled scene is needed, and no number may be negative."
        )
    ids = [f"scene_{index:05d}" for index in range(validation + labeled + unlabeled)]
    lists = {
        "validation.txt": ids[:validation],
        "labeled.txt": ids[validation : validation + labeled],
        "unlabeled.txt": ids[validation + labeled :],
    }
    marker = root / MARKER
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
        marker.unlink(missing_ok=True)  # the set is incomplete from here until the end
    except OSError as error:
        raise storage_error(error, marker) from error
    for index, id_ in enumerate(ids):
        image, label = draw_scene(seed, index)
        write_map(root / "images" / f"{id_}.png", image[..., ::-1])
        write_map(root / "labels" / f"{id_}.png", label)
    for name, members in lists.items():
        write_whole(root / name, "".join(f"{id_}\n" for id_ in members).encode())
    write_whole(marker, wanted.encode())


Thing = tuple[float, functools.partial[None]]
"""Something that stands on the ground: its distance, and the call that draws it."""


def _distance(rng: np.random.Generator, low: float, high: float) -> float:
    """A random distance between two, in meters; near ones are more likely."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _vehicles(canvas: Canvas) -> list[Thing]:
    """Cars and vans: on their way, parked at the curb, and crossing."""
    rng, half = canvas.rng, canvas.half
    things: list[Thing] = []

    def add(x: float, z: float, crossing: bool = False) -> None:
        kind = VAN if rng.random() < 0.2 else CAR
        things.append((z, functools.partial(draw_vehicle, canvas, x, z, kind=kind, crossing=crossing)))

    for _ in range(rng.poisson(0.9)):
        x = float(rng.choice([-0.5, 0.5])) * half + rng.normal(0, 0.3)
        add(x, _distance(rng, 8, 60))
    for side in (-1, 1):
        if rng.random() < 0.5:
            z = rng.uniform(6, 26)
            while z < 60:
                if rng.random() < 0.55:
                    add(side * (half - 1.1 + rng.normal(0, 0.12)), z)
                z += rng.uniform(6.0, 9.0)
    if rng.random() < 0.15:
        z = _distance(rng, 12, 30)
        add(rng.uniform(-half, half), z, crossing=True)
    return things


def _people(canvas: Canvas) -> list[Thing]:
    """People on the sidewalks, and some on the road."""
    rng, half = canvas.rng, canvas.half
    things: list[Thing] = []
    for _ in range(rng.poisson(1.3)):
        z = _distance(rng, 11, 55)
        side = int(rng.integers(2))
        if rng.random() < 0.8:
            x = (half + max(canvas.walks[side], 1.0) * rng.uniform(0.2, 0.9)) * (2 * side - 1)
        else:
            x = rng.uniform(-half, half)
        things.append((z, functools.partial(draw_person, canvas, x, z)))
    return things


def _street_furniture(canvas: Canvas) -> list[Thing]:
    """Rows of lamp posts, signs, and trees."""
    rng, half = canvas.rng, canvas.half
    things: list[Thing] = []
    for side in (0, 1):
        way = 2 * side - 1
        if rng.random() < 0.55:
            z, gap, tall = rng.uniform(9, 26), rng.uniform(14, 26), rng.uniform(5, 8)
            arm = -way * rng.uniform(0.8, 1.8) if rng.random() < 0.7 else 0.0
            while z < 75:
                x = way * (half + 0.5)
                things.append((z, functools.partial(draw_pole, canvas, x, z, tall=tall, arm=arm)))
                z += gap
        if rng.random() < 0.18:
            z = _distance(rng, 21, 50)
            things.append((z, functools.partial(draw_sign, canvas, way * (half + rng.uniform(0.3, 1.0)), z)))
        has_trees = rng.random() < (0.3 if canvas.built[side] else 0.75)
        for _ in range(rng.poisson(3) if has_trees else 0):
            z = _distance(rng, 10, 70)
            x = way * (half + canvas.walks[side] + rng.uniform(0.2, 1.0))
            if not canvas.built[side]:
                x += way * rng.exponential(4.0)
            things.append((z, functools.partial(draw_tree, canvas, x, z)))
    return things


def _photograph(canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Put air, light, lens and sensor in front of the picture; returns what `draw_scene` does."""
    rng, image = canvas.rng, canvas.image
    height, width = canvas.height, canvas.width
    night = canvas.weather == "night"
    gain = {"clear": (0.85, 1.2), "overcast": (0.7, 1.05), "fog": (0.75, 1.0), "night": (0.3, 0.5)}
    slant = np.linspace(-1, 1, width) * rng.uniform(0, 0.2) * canvas.sun
    down = np.linspace(-1, 1, height) * rng.normal(0, 0.08)
    light = ((1 + slant[None] + down[:, None]) * rng.uniform(*gain[canvas.weather])).astype(np.float32)
    warmth = rng.normal(0, 0.06) - (0.08 if night else 0)
    temperature = rgb([1 + warmth, 1.0, 1 - warmth])
    grain = 1 + GRAIN[canvas.label] * canvas.crop(0, height, width)
    thick = rng.uniform(0.012, 0.04) if canvas.weather == "fog" else rng.uniform(0.0005, 0.003)
    through = np.exp(np.float32(-thick) * np.minimum(canvas.depth, 200.0)) * np.float32(1)
    through[canvas.label == SKY] = 1
    # haze + (color * grain - haze) * through, all in this light
    haze = rgb([200, 202, 205]) * temperature * np.float32(0.3 if night else 1.0)
    image = (
        image * (temperature * (grain * through * light)[..., None])
        + haze * ((1 - through) * light)[..., None]
    )
    if night:
        small = cv2.resize(canvas.glow, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        halo = cv2.resize(cv2.GaussianBlur(small, (0, 0), 4.0), (width, height))
        image += np.float32(0.7) * canvas.glow + halo + np.float32(0.006) * halo * image

    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.35, 0.85))
    # Sensor noise grows with the square root of the light; dark scenes are taken at a higher gain.
    rough = np.float32(rng.uniform(1.0, 3.0) * (2.0 if night else 1.0))
    np.clip(image, 0, 255, out=image)
    image += canvas.crop(3, height, width) * (rough * np.sqrt(np.float32(0.4) + image * np.float32(1 / 160)))
    pixels = np.rint(image.clip(0, 255)).astype(np.uint8)

    vehicles = ((canvas.label == CAR) | (canvas.label == VAN)).astype(np.uint8)
    rim = cv2.dilate(vehicles, np.ones((3, 3), np.uint8)) > vehicles
    rim &= canvas.label < PERSON  # thin things keep all their pixels
    label = canvas.label.copy()
    label[rim] = IGNORE
    return pixels, label
