"""Augmentation: the one warp equals the slow sequence, image and label stay aligned, and draws are distributed well."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from darseg.data import augment as module
from darseg.data.augment import Augmentation, augment
from darseg.errors import RecipeError
from wording import refused

FILL = (7, 250, 99)
PLAIN = {"scale": (1.0, 1.0), "rotate": 0.0, "blur": False, "mirror": False, "fill": FILL}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red is x, green y and blue 30, and a label that numbers its 16x16 blocks."""
    y, x = np.mgrid[:height, :width]
    image = np.dstack([x, y, np.full_like(x, 30)]).astype(np.uint8)
    return image, (x // 16 + 15 * (y // 16)).astype(np.uint8)


def smooth(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A soft image, and a label of 26x22 blocks."""
    coarse = rng().normal(128, 40, (height // 8, width // 8, 3))
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    label = np.kron(rng().integers(0, 5, (height // 26 + 1, width // 22 + 1)), np.ones((26, 22)))
    return np.clip(image, 0, 255).astype(np.uint8), label[:height, :width].astype(np.uint8)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What each call of `augment` drew, and whether it blurred."""
    calls: list[dict] = []
    plain, blur = module.crop_to_source, cv2.GaussianBlur

    def record(size, scaled, *, angle, mirror, offset):
        calls.append({"scaled": scaled, "angle": angle, "mirror": mirror, "offset": offset, "blur": False})
        return plain(size, scaled, angle=angle, mirror=mirror, offset=offset)

    def record_blur(*arguments):
        calls[-1]["blur"] = True
        return blur(*arguments)

    monkeypatch.setattr(module, "crop_to_source", record)
    monkeypatch.setattr(cv2, "GaussianBlur", record_blur)
    return calls


def slowly(
    image: np.ndarray, label: np.ndarray, crop: tuple[int, int], scaled, angle, mirror, offset, blur
) -> tuple[np.ndarray, np.ndarray]:
    """The sequence as the release runs it, step by step on the whole image."""
    assert not blur
    height, width = scaled
    moved = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    # Plain INTER_NEAREST rounds down: half a pixel off the image that INTER_LINEAR makes.
    labels = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    if angle:
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        moved = cv2.warpAffine(moved, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=FILL)
        labels = cv2.warpAffine(labels, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=255)
    if mirror:
        moved, labels = moved[:, ::-1], labels[:, ::-1]
    pad_y, pad_x = max(0, crop[0] - height), max(0, crop[1] - width)
    by = ((pad_y // 2, pad_y - pad_y // 2), (pad_x // 2, pad_x - pad_x // 2))
    labels = np.pad(labels, by, constant_values=255)
    moved = np.stack(
        [np.pad(moved[..., c], by, constant_values=value) for c, value in enumerate(FILL)], axis=-1
    )
    row, column = (max(0, part) for part in offset)
    window = np.s_[row : row + crop[0], column : column + crop[1]]
    return moved[window], labels[window]


def sources(size, crop, scaled, angle, mirror, offset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each crop pixel: x and y in the source image, and whether it lies on the scaled canvas."""
    row, column = np.mgrid[: crop[0], : crop[1]]
    row, column = row + offset[0], column + offset[1]
    on_canvas = (row >= 0) & (row < scaled[0]) & (column >= 0) & (column < scaled[1])
    if mirror:
        column = scaled[1] - 1 - column
    center = complex((scaled[1] - 1) / 2, (scaled[0] - 1) / 2)
    # y points down, so turning the picture counter-clockwise back is multiplying by exp(+i angle).
    turned = (column + 1j * row - center) * np.exp(1j * math.radians(angle)) + center
    x = (turned.real + 0.5) * size[1] / scaled[1] - 0.5
    y = (turned.imag + 0.5) * size[0] / scaled[0] - 0.5
    return x, y, on_canvas


def test_an_augmentation_without_changes_is_the_identity():
    image, label = smooth(64, 80)
    out, moved = augment(image, label, Augmentation((64, 80), **PLAIN), generator=rng())
    assert np.array_equal(out, image) and np.array_equal(moved, label)


@pytest.mark.parametrize("crop", [(20, 30), (64, 30), (64, 80), (100, 30), (99, 121)])
def test_mirror_and_crop_move_whole_pixels(crop: tuple[int, int], drawn: list[dict]):
    image, label = smooth(64, 80)
    seen = set()
    for seed in range(20):
        out, moved = augment(
            image, label, Augmentation(crop, **PLAIN | {"mirror": True}), generator=rng(seed)
        )
        expected, labels = slowly(image, label, crop, **drawn[-1])
        seen.add(drawn[-1]["mirror"])
        assert np.array_equal(out, expected) and np.array_equal(moved, labels)
    assert seen == {False, True}


@pytest.mark.parametrize("factor", [0.5, 0.73, 1.0, 1.31, 2.0, 3.0])
@pytest.mark.parametrize("crop", [(48, 64), (201, 253)])
def test_scaling_equals_a_resize(factor: float, crop: tuple[int, int], drawn: list[dict]):
    image, label = smooth(128, 160)
    for seed in range(3):
        how = Augmentation(crop, **PLAIN | {"scale": (factor, factor), "mirror": True})
        out, moved = augment(image, label, how, generator=rng(seed))
        expected, labels = slowly(image, label, crop, **drawn[-1])
        assert np.abs(out - expected).max() <= 2.5  # OpenCV warps with 1/32 of a pixel
        assert np.abs(out - expected).mean() < 0.6  # rounding to uint8 alone: 0.25
        draw = {key: value for key, value in drawn[-1].items() if key != "blur"}
        x, y, _ = sources(label.shape, crop, **draw)
        between = (np.abs(x % 1 - 0.5) < 0.05) | (np.abs(y % 1 - 0.5) < 0.05)  # either neighbor is nearest
        assert np.array_equal(moved[~between], labels[~between])
        assert (moved == labels).mean() > 0.97


def test_all_changes_together_equal_the_slow_sequence(drawn: list[dict]):
    image, label = smooth(128, 160)
    agreed, differences, angles = [], [], set()
    for seed in range(60):
        crop = [(65, 81), (129, 113), (301, 333)][seed % 3]
        how = Augmentation(crop, **PLAIN | {"scale": (0.5, 2.0), "rotate": 10.0, "mirror": True})
        out, moved = augment(image, label, how, generator=rng(seed))
        expected, labels = slowly(image, label, crop, **drawn[-1])
        angles.add(np.sign(drawn[-1]["angle"]))
        agreed.append((moved == labels).mean())
        inside = cv2.erode(((moved != 255) & (labels != 255)).astype(np.uint8), np.ones((5, 5))) == 1
        differences.append(np.abs(out - expected)[inside].mean())
    assert angles == {-1.0, 0.0, 1.0}
    assert max(differences) < 1.0
    assert min(agreed) > 0.96 and np.mean(agreed) > 0.985


def test_image_and_label_stay_aligned_to_the_pixel(drawn: list[dict]):
    size = (200, 232)
    image, label = coordinates(*size)
    checked = 0
    for seed in range(60):
        crop = [(97, 129), (257, 281), (481, 401)][seed % 3]
        how = Augmentation(crop, **PLAIN | {"scale": (0.5, 2.0), "rotate": 10.0, "mirror": True})
        out, moved = augment(image, label, how, generator=rng(seed))
        draw = {key: value for key, value in drawn[-1].items() if key != "blur"}
        x, y, on_canvas = sources(size, crop, **draw)
        outside = np.maximum.reduce([-0.5 - x, x - size[1] + 0.5, -0.5 - y, y - size[0] + 0.5])
        inside = on_canvas & (outside < -0.05)  # nearer to the edge, fixed-point numbers decide
        empty = ~on_canvas | (outside > 0.05)

        # No source: 255, and the fill (the edge pixel is repeated once, so up to two pixels later).
        assert (moved[empty] == 255).all() and (moved[inside] != 255).all()
        assert (out[~on_canvas | (outside > 1.6)] == FILL).all()
        assert (out[inside][:, 2] == 30).all()

        # The image comes from where it should, and the label from where the image comes.
        assert np.abs(out[inside][:, 0] - np.clip(x[inside], 0, size[1] - 1)).max() <= 0.6
        assert np.abs(out[inside][:, 1] - np.clip(y[inside], 0, size[0] - 1)).max() <= 0.6
        from_x, from_y = out[..., 0].astype(int), out[..., 1].astype(int)
        sure = inside & (from_x % 16 % 15 > 0) & (from_y % 16 % 15 > 0)  # not at a block's edge
        assert np.array_equal(moved[sure], (from_x // 16 + 15 * (from_y // 16))[sure])
        checked += sure.sum()
    assert checked > 500_000


def test_rotated_corners_outside_the_canvas_are_padding(drawn: list[dict]):
    """Rotation keeps the size, so the corners are cut off even if a larger crop could show them."""
    image, label = coordinates(60, 200)
    how = Augmentation((121, 301), **PLAIN | {"rotate": 45.0})
    rotated = 0
    for seed in range(20):
        out, moved = augment(image, label, how, generator=rng(seed))
        beyond = np.ones(moved.shape, bool)
        beyond[30:90, 50:250] = False
        assert (moved[beyond] == 255).all() and (out[beyond] == FILL).all()
        if abs(drawn[-1]["angle"]) > 5:
            rotated += 1
            corners = moved[[30, 30, 89, 89], [50, 249, 50, 249]]
            assert (corners == 255).sum() == 2 or abs(drawn[-1]["angle"]) > 16
            assert (moved[30:90, 50:250] == 255).any()
    assert rotated >= 5


def test_positive_angles_turn_counter_clockwise():
    label = np.zeros((101, 101), np.uint8)
    label[45:56, 90:] = 1  # a mark at three o'clock
    matrix = module.crop_to_source((101, 101), (101, 101), angle=90.0, mirror=False, offset=(0, 0))
    moved = cv2.warpAffine(label, matrix, (101, 101), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
    assert (moved[:11, 45:56] == 1).all() and moved.sum() == 121  # now at twelve


def kolmogorov(values: np.ndarray, low: float, high: float) -> float:
    """Largest distance to the uniform distribution, times sqrt(n): above 1.63 in one of 100 cases."""
    sorted_ = np.sort((values - low) / (high - low))
    steps = np.arange(len(sorted_) + 1) / len(sorted_)
    return max((steps[1:] - sorted_).max(), (sorted_ - steps[:-1]).max()) * math.sqrt(len(sorted_))


def test_draws_have_the_documented_distributions(drawn: list[dict]):
    count, generator = 2000, rng(5)
    image, label = np.zeros((600, 400, 3), np.uint8), np.zeros((600, 400), np.uint8)
    how = Augmentation((9, 9), scale=(0.5, 2.0), rotate=10.0)
    for _ in range(count):
        augment(image, label, how, generator=generator)
    scale = np.array([call["scaled"][0] / 600 for call in drawn])
    assert kolmogorov(scale, 0.5, 2.0) < 1.63
    for call in drawn:  # one factor for both sides
        assert abs(call["scaled"][1] / 400 - call["scaled"][0] / 600) < 0.5 / 400 + 0.5 / 600
    angle = np.array([call["angle"] for call in drawn])
    assert kolmogorov(angle[angle != 0], -10, 10) < 1.63
    rows = np.array([(call["offset"][0] + 0.5) / (call["scaled"][0] - 8) for call in drawn])
    columns = np.array([(call["offset"][1] + 0.5) / (call["scaled"][1] - 8) for call in drawn])
    assert kolmogorov(rows, 0, 1) < 1.63 and kolmogorov(columns, 0, 1) < 1.63
    assert np.abs(np.corrcoef([scale, angle, rows, columns]) - np.eye(4)).max() < 0.08
    # Rotation, mirror and blur: each for half of the examples, independently of each other.
    kinds = np.array([(call["angle"] != 0) + 2 * call["mirror"] + 4 * call["blur"] for call in drawn])
    eighth = count / 8
    assert np.abs(np.bincount(kinds, minlength=8) - eighth).max() < 4 * math.sqrt(eighth)


def plainly(
    image: np.ndarray, label: np.ndarray, how: Augmentation, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The plain sequence with draws of its own, each made when it is needed."""
    scale = generator.uniform(*how.scale)
    scaled = tuple(max(1, round(side * scale)) for side in label.shape)
    angle = generator.uniform(-how.rotate, how.rotate) if generator.random() < 0.5 else 0.0
    mirror = generator.random() < 0.5
    rooms = [have - want for have, want in zip(scaled, how.crop, strict=True)]
    offset = tuple(int(generator.integers(room + 1)) if room > 0 else 0 for room in rooms)
    return slowly(
        image, label, how.crop, scaled=scaled, angle=angle, mirror=mirror, offset=offset, blur=False
    )


def measured(image: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """How an example of `coordinates` was made, measured from its pixels only."""
    inside = cv2.erode((label != 255).astype(np.uint8), np.ones((5, 5)), borderValue=0) == 1
    row, column = np.nonzero(inside)
    places = np.stack([column, row, np.ones_like(row)], axis=1)
    (to_x, to_y), *_ = np.linalg.lstsq(places, image[inside][:, :2], rcond=None)[0].T[None]
    determinant = to_x[0] * to_y[1] - to_x[1] * to_y[0]
    angle = math.degrees(math.atan2(to_x[1], to_y[1]))
    height, width = label.shape
    ignored = label == 255
    return {
        "scale": 1 / math.sqrt(abs(determinant)),
        "angle": angle if abs(angle) > 0.25 else 0.0,
        "mirror": float(determinant < 0),
        "center x": to_x @ [width / 2, height / 2, 1],
        "center y": to_y @ [width / 2, height / 2, 1],
        "ignored": ignored.mean(),
        "ignored above": ignored[0].mean(),
        "ignored below": ignored[-1].mean(),
        "ignored left": ignored[:, 0].mean(),
        "ignored right": ignored[:, -1].mean(),
        "filled": (np.round(image) == FILL).all(axis=2).mean(),
    }


@pytest.mark.parametrize("crop", [(97, 129), (161, 241)])
def test_examples_have_the_distribution_of_the_plain_sequence(crop: tuple[int, int]):
    """Scales, angles, mirror, positions and ignored borders, measured from the pixels: Kolmogorov-Smirnov tests."""
    image, label = coordinates(200, 232)
    how = Augmentation(crop, scale=(0.5, 2.0), rotate=10.0, blur=False, fill=FILL)
    count, own_rng, plain_rng = 500, rng(11), rng(12)
    ours = [measured(*augment(image, label, how, generator=own_rng)) for _ in range(count)]
    expected = [measured(*plainly(image, label, how, generator=plain_rng)) for _ in range(count)]
    for name in ours[0]:
        # Rounded: the same value, a whole pixel or an angle of 0, measured twice.
        a, b = (
            np.sort(np.round([example[name] for example in examples], 2)) for examples in (ours, expected)
        )
        places = np.concatenate([a, b])
        apart = np.searchsorted(a, places, "right") - np.searchsorted(b, places, "right")
        distance = np.abs(apart).max() / count * math.sqrt(count / 2)
        assert distance < 1.8, f"{name}: {distance:.2f}"  # above it in 3 of 1,000 cases
    spread = {name: np.ptp([example[name] for example in ours]) for name in ours[0]}
    assert spread["scale"] > 1.4 and spread["angle"] > 18 and spread["ignored"] > 0.1  # not constant


def test_crops_cover_all_positions_equally():
    image, label = coordinates(12, 10)
    generator, count = rng(1), 5600
    how = Augmentation((5, 4), **PLAIN)
    corners = np.zeros((8, 7), int)
    for _ in range(count):
        out, _ = augment(image, label, how, generator=generator)
        corners[out[0, 0, 1], out[0, 0, 0]] += 1
    assert np.abs(corners - count / 56).max() < 4.5 * math.sqrt(count / 56)


def test_each_change_can_be_switched_off(drawn: list[dict]):
    image, label = smooth(64, 80)
    for seed in range(30):
        augment(image, label, Augmentation((33, 33), **PLAIN), generator=rng(seed))
    assert all(
        (c["angle"], c["mirror"], c["blur"], c["scaled"]) == (0, False, False, (64, 80)) for c in drawn
    )


def test_blur_is_the_five_pixel_gaussian():
    image, label = np.zeros((21, 21, 3), np.uint8), np.zeros((21, 21), np.uint8)
    image[10, 10] = 255
    how = Augmentation((21, 21), **PLAIN | {"blur": True})
    outs = [augment(image, label, how, generator=rng(seed))[0] for seed in range(10)]
    blurred = [out for out in outs if not np.array_equal(out, image)]
    assert 1 <= len(blurred) <= 9
    weights = np.exp(-(np.arange(-2.0, 3) ** 2) / (2 * 1.1**2))  # sigma 0.3 ((5 - 1) / 2 - 1) + 0.8
    weights /= weights.sum()
    expected = 255 * np.outer(weights, weights)
    for out in blurred:
        assert np.abs(out[8:13, 8:13] - expected[..., None]).max() <= 1.5
        assert np.count_nonzero(out) == 75


def test_padding_is_not_blurred_into_the_image():
    image, label = smooth(16, 24)
    how = Augmentation((33, 41), **PLAIN | {"blur": True})
    seen = set()
    for seed in range(10):
        out, moved = augment(image, label, how, generator=rng(seed))
        canvas = np.s_[8:24, 8:32]
        blurred = not np.array_equal(out[canvas], image)
        seen.add(blurred)
        assert not blurred or np.array_equal(out[canvas], cv2.GaussianBlur(image, (5, 5), 0))
        out[canvas], moved[canvas] = FILL, 255
        assert (out == FILL).all() and (moved == 255).all()
    assert seen == {False, True}


def test_the_generator_decides_and_every_call_takes_the_same_number_of_draws():
    image, label = smooth(64, 80)
    how = Augmentation((33, 41))
    for seed in range(10):
        first_rng, second_rng, plain_rng = rng(seed), rng(seed), rng(seed)
        first = augment(image, label, how, generator=first_rng)
        second = augment(image, label, how, generator=second_rng)
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        augment(image, label, Augmentation((99, 99), **PLAIN), generator=plain_rng)
        assert first_rng.random() == second_rng.random() == plain_rng.random()
    assert not np.array_equal(
        augment(image, label, how, generator=rng(1))[0], augment(image, label, how, generator=rng(2))[0]
    )


def test_the_input_is_not_changed():
    image, label = smooth(64, 80)
    image.setflags(write=False)
    label.setflags(write=False)
    for seed in range(8):
        augment(image, label, Augmentation((64, 80)), generator=rng(seed))


sides = st.integers(1, 40)
factors = st.floats(0.05, 4.0)


@settings(max_examples=150, deadline=None)
@given(sides, sides, sides, sides, factors, factors, st.floats(0, 180), st.integers(0, 2**32))
@example(1, 1, 1, 1, 0.05, 0.05, 180.0, 0)
@example(1, 1, 40, 40, 1.0, 4.0, 45.0, 1)
@example(40, 1, 1, 40, 0.05, 1.0, 0.0, 2)
def test_any_size_and_setting_gives_a_crop_of_the_right_size(
    height, width, rows, columns, low, high, rotate, seed
):
    image = np.full((height, width, 3), 90, np.uint8)
    label = np.full((height, width), 3, np.uint8)
    how = Augmentation((rows, columns), tuple(sorted((low, high))), rotate, fill=FILL)
    out, moved = augment(image, label, how, generator=rng(seed))
    assert out.shape == (rows, columns, 3) and moved.shape == (rows, columns)
    assert out.dtype == moved.dtype == np.uint8
    assert out.flags.c_contiguous and moved.flags.c_contiguous
    assert set(np.unique(moved)) <= {3, 255}
    low_color, high_color = np.minimum(90, FILL), np.maximum(90, FILL)
    assert (out >= low_color).all() and (out <= high_color).all()


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        pytest.param({"crop": (0, 5)}, ["(0, 5)", "1 pixel"], id="an empty crop"),
        pytest.param({"crop": (5, 5), "scale": (0.0, 1.0)}, ["(0.0, 1.0)", "above 0"], id="a scale of 0"),
        pytest.param({"crop": (5, 5), "scale": (2.0, 0.5)}, ["(2.0, 0.5)"], id="scales in the wrong order"),
        pytest.param({"crop": (5, 5), "scale": (0.5, math.nan)}, ["(0.5, nan)"], id="a scale of NaN"),
        pytest.param({"crop": (5, 5), "rotate": -1.0}, ["-1.0 degrees"], id="a negative rotation"),
    ],
)
def test_settings_that_are_refused(values: dict, facts: list[str]):
    with refused(RecipeError, *facts):
        Augmentation(**values)
