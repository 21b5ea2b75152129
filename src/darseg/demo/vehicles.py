"""Cars and vans of a drawn scene.

Points of a vehicle are (across, up, along) in meters in its own frame: across from its middle, along from 0 at the end
nearest to the viewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from darseg.demo.canvas import CAR, VAN, Canvas, Color, Point, Shape, circle, scaled

PAINTS: tuple[Color, ...] = (
    (222, 222, 218),
    (165, 168, 172),
    (92, 95, 100),
    (40, 41, 45),
    (150, 32, 30),
    (36, 62, 128),
    (50, 92, 66),
    (196, 160, 60),
)
CAR_PAINT = (0.16, 0.18, 0.16, 0.16, 0.12, 0.12, 0.05, 0.05)
VAN_PAINT = (0.32, 0.16, 0.12, 0.08, 0.10, 0.12, 0.05, 0.05)
"""How likely a car or a van has each of the paints."""

DARK: Color = (24.0, 24.0, 26.0)
"""Wheels."""

LOW = 0.3
"""Height of the body's lower edge, in meters."""


@dataclass(frozen=True)
class _Vehicle:
    """Shape, place and colors of one vehicle; lengths in meters.

    Attributes:
        x, z: where it stands.
        crossing: it is seen from the side. toward: it drives toward the viewer.
        half, half_top: half the width of the body, and of the roof.
        belt, roof: heights of the windows' lower edge and of the roof.
        front, back: where the cabin begins and ends along the body; rear, fore: the same at the roof.
        seen: the side that is seen, -1 (left) or 1.
    """

    x: float
    z: float
    kind: int
    crossing: bool
    toward: bool
    long: float
    wide: float
    half: float
    half_top: float
    belt: float
    roof: float
    front: float
    back: float
    rear: float
    fore: float
    seen: float
    side_paint: Color
    end_paint: Color
    top_paint: Color
    glass: Color

    def place(self, points: Sequence[Point]) -> list[Point]:
        """Points of the vehicle's frame → points of the street."""
        if self.crossing:
            return [
                (self.x + along - self.long / 2, up, self.z + self.wide / 2 - across)
                for across, up, along in points
            ]
        return [(self.x + across, up, self.z + along) for across, up, along in points]

    def box(self, middle: float, half: float, heights: tuple[float, float], *, along: float) -> list[Point]:
        """A rectangle that faces the viewer."""
        left, right = middle - half, middle + half
        bottom, top = heights
        return self.place(
            [(left, bottom, along), (left, top, along), (right, top, along), (right, bottom, along)]
        )

    def panes(self) -> tuple[float, float]:
        """Heights of the lower and upper edge of the window panes."""
        return _mix(self.belt, self.roof, 0.12), _mix(self.belt, self.roof, 0.86)


def _mix(first: float, last: float, share: float) -> float:
    return first + (last - first) * share


def draw_vehicle(canvas: Canvas, x: float, z: float, *, kind: int, crossing: bool) -> None:
    """Draw a car or a van, seen from behind or in front, or from the side if it is `crossing`.

    Args:
        x, z: meters right of the middle of the street, and ahead.
        kind: CAR or VAN.
    """
    vehicle = _random_vehicle(canvas, x, z, kind=kind, crossing=crossing)
    half, long = vehicle.half, vehicle.long
    side = _side(vehicle, canvas.camera.above)
    corners = [
        (-half, vehicle.belt, 0),
        (half, vehicle.belt, 0),
        (half, vehicle.belt, long),
        (-half, vehicle.belt, long),
    ]
    tops: list[Shape] = [(vehicle.place(corners), vehicle.top_paint)]
    footprint = [
        (-half - 0.15, 0.0, -0.3),
        (half + 0.15, 0.0, -0.3),
        (half + 0.15, 0.0, long),
        (-half - 0.15, 0.0, long),
    ]
    cast = 0.5 * canvas.sun * (canvas.weather == "clear" and not crossing)
    canvas.shadow([(px - cast, 0.0, pz) for px, _, pz in vehicle.place(footprint)], 0.5)
    if crossing:
        canvas.paint(tops + side, kind, z)
        return
    feet: list[Shape] = [(vehicle.box(s * (half - 0.15), 0.12, (0.0, 0.4), along=0.3), DARK) for s in (-1, 1)]
    has_window = kind == CAR or vehicle.toward or canvas.rng.random() < 0.6
    canvas.paint(feet + tops + side + _end(vehicle, has_window), kind, z)
    if canvas.weather == "night":
        for s in (-1, 1):
            lamp = (x + s * (half - 0.22), 0.69, z)
            canvas.shine(lamp, 0.35, (255, 240, 190) if vehicle.toward else (150, 20, 15))


def _random_vehicle(canvas: Canvas, x: float, z: float, *, kind: int, crossing: bool) -> _Vehicle:
    """A car or a van of random measures and colors."""
    rng = canvas.rng
    paint = PAINTS[rng.choice(8, p=VAN_PAINT if kind == VAN else CAR_PAINT)]
    paint = scaled(paint, rng.uniform(0.85, 1.1))
    glass = scaled((44, 52, 62), rng.uniform(0.7, 1.4))
    if kind == VAN:
        wide, long = rng.uniform(1.85, 2.1), rng.uniform(4.6, 5.8)
        belt, roof = rng.uniform(1.1, 1.3), rng.uniform(1.95, 2.5)
        cabin = (0.02, 0.86)  # where it begins and ends, as shares of the length
    else:
        wide, long = rng.uniform(1.65, 1.85), rng.uniform(3.7, 4.6)
        belt, roof = rng.uniform(0.82, 0.95), rng.uniform(1.38, 1.62)
        cabin = (rng.uniform(0.03, 0.2), rng.uniform(0.66, 0.76))
    toward = rng.random() < 0.4
    if toward:
        cabin = (1 - cabin[1], 1 - cabin[0])
    inset, slope = (0.04, 0.05) if kind == VAN else (0.2, 0.4)  # how far the windows lean inward
    half, front, back = wide / 2, cabin[0] * long, cabin[1] * long
    # The side that is seen: the near one when crossing, otherwise the one toward the middle of the picture.
    seen = 1.0 if crossing or x + canvas.camera.bend * z * z < 0 else -1.0
    return _Vehicle(
        x=x,
        z=z,
        kind=kind,
        crossing=crossing,
        toward=toward,
        long=long,
        wide=wide,
        half=half,
        half_top=half - inset,
        belt=belt,
        roof=roof,
        front=front,
        back=back,
        rear=front + slope,
        fore=back - slope,
        seen=seen,
        side_paint=scaled(paint, 0.62 if (seen > 0) == (canvas.sun < 0) else 0.9),
        end_paint=scaled(paint, 0.78),
        top_paint=scaled(paint, 1.12),
        glass=glass,
    )


def _side(vehicle: _Vehicle, camera_height: float) -> list[Shape]:
    """The side that is seen: body, wheels and windows; and the roof, if the camera looks down on vehicle."""
    belt, roof, long = vehicle.belt, vehicle.roof, vehicle.long
    front, back, rear, fore = vehicle.front, vehicle.back, vehicle.rear, vehicle.fore
    body, top = vehicle.seen * vehicle.half, vehicle.seen * vehicle.half_top
    cabin = [
        (body, belt, front),
        (top, roof, rear),
        (top, roof, fore),
        (body, belt, back),
    ]
    side: list[Shape] = [
        (
            vehicle.place([(body, LOW, 0), (body, belt, 0), (body, belt, long), (body, LOW, long)]),
            vehicle.side_paint,
        ),
        (vehicle.place(cabin), vehicle.side_paint),
    ]
    side += [
        (vehicle.place([(body, 0.32 + 0.32 * s, along + 0.33 * c) for s, c in circle(10)]), DARK)
        for along in (0.19 * long, 0.8 * long)
    ]
    panes = [(0.1, 0.48), (0.54, 0.9)]
    if vehicle.kind == VAN:  # only the driver has a window
        panes = [(0.08, 0.3)] if vehicle.toward else [(0.7, 0.93)]
    lower, upper = vehicle.panes()
    across_lower, across_upper = _mix(body, top, 0.12), _mix(body, top, 0.86)
    for first, last in panes:
        corners = [
            (across_lower, lower, _mix(front, back, first)),
            (across_upper, upper, _mix(rear, fore, first)),
            (across_upper, upper, _mix(rear, fore, last)),
            (across_lower, lower, _mix(front, back, last)),
        ]
        side.append((vehicle.place(corners), vehicle.glass))
    if camera_height > roof:
        half = vehicle.half_top
        corners = [
            (-half, roof, rear),
            (half, roof, rear),
            (half, roof, fore),
            (-half, roof, fore),
        ]
        side.append((vehicle.place(corners), vehicle.top_paint))
    return side


def _end(vehicle: _Vehicle, has_window: bool) -> list[Shape]:
    """The end that faces the viewer: body, cabin, window and lamps."""
    half, half_top = vehicle.half, vehicle.half_top
    cabin = [
        (-half, vehicle.belt, vehicle.front),
        (-half_top, vehicle.roof, vehicle.rear),
        (half_top, vehicle.roof, vehicle.rear),
        (half, vehicle.belt, vehicle.front),
    ]
    end: list[Shape] = [
        (vehicle.box(0, half, (LOW, vehicle.belt), along=0), vehicle.end_paint),
        (vehicle.place(cabin), vehicle.end_paint),
    ]
    if has_window:
        lower, upper = vehicle.panes()
        lower_at, upper_at = _mix(vehicle.front, vehicle.rear, 0.12), _mix(vehicle.front, vehicle.rear, 0.86)
        low, high = 0.82 * half, 0.86 * half_top
        window = [
            (-low, lower, lower_at),
            (-high, upper, upper_at),
            (high, upper, upper_at),
            (low, lower, lower_at),
        ]
        end.append((vehicle.place(window), vehicle.glass))
    lamps: Color = (235.0, 232.0, 205.0) if vehicle.toward else (170.0, 26.0, 24.0)
    end += [(vehicle.box(s * (half - 0.22), 0.16, (0.6, 0.78), along=0), lamps) for s in (-1, 1)]
    return end
