"""Label values that are no classes, palettes that disagree, and transparent pixels: counted, explained, read right."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from darseg.config.text import load_recipe
from darseg.data.examine import Findings
from darseg.data.labels import read_label
from darseg.data.tables import nearest_classes
from darseg.init import fit
from darseg.init.propose import propose_recipe
from darseg.run.build import classes_of, manifest_of
from darseg.run.check import check
from darseg.run.rounds import train
from wording import says

SIZE = (80, 96)
COLORS = np.array([[0, 0, 0], [200, 30, 30], [30, 30, 220]], np.uint8)
GRAYS = np.array([0, 127, 255], np.uint8)
FILES = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is timed."""
    monkeypatch.setattr(fit, "step_seconds", lambda *_: 1.0)


def scene(number: int, classes: int = 3) -> np.ndarray:
    """A disk (1) and a rectangle (2) on ground (0)."""
    label = np.zeros(SIZE, np.uint8)
    cv2.circle(label, (30 + 3 * number, 35), 18, 1, -1)
    if classes > 2:
        cv2.rectangle(label, (55, 10 + 2 * number), (80, 40 + 2 * number), 2, -1)
    return label


def draw(root: Path, labels: list[np.ndarray | Image.Image]) -> None:
    for number, label in enumerate(labels):
        image = label if isinstance(label, Image.Image) else Image.fromarray(label)
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*image.size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        image.save(root / "labels" / f"{number}.png")


def check_with(root: Path, classes: object, **data: object) -> Findings:
    """What `check` finds with a recipe of these classes."""
    content = {
        "data": {"root": str(root), "classes": classes, "validation": {"every": 4}, **data},
        "network": {"backbone": "resnet18_half", "head_channels": 16, "weights": "none"},
        "training": {"crop": 33, "batch": 4},
        "rounds": [{"steps": 2}],
        "threads": 1,
    }
    (root / "r.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return check(load_recipe(root / "r.yaml"))


def jpeg(pixels: np.ndarray) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=90)
    return np.array(Image.open(data))


def enlarged(pixels: np.ndarray) -> np.ndarray:
    return cv2.resize(pixels, (150, 130), interpolation=cv2.INTER_LINEAR)


def with_specks(number: int) -> np.ndarray:
    label = scene(number)
    if number == 2:
        label[3, 4], label[60, 70] = 9, 77
    return label


FLAWED = {
    "smoothed": ([cv2.GaussianBlur(scene(n, 2) * 255, (3, 3), 0) for n in range(FILES)], 2),
    "smoothed colors": ([cv2.GaussianBlur(COLORS[scene(n)], (3, 3), 0) for n in range(FILES)], 3),
    "resized": ([enlarged(GRAYS[scene(n)]) for n in range(FILES)], 3),
    "one jpeg": (
        [jpeg(scene(n, 2) * 255) if n == 3 else scene(n, 2) * 255 for n in range(FILES)],
        2,
    ),
    "one jpeg of colors": ([jpeg(COLORS[scene(n)]) if n == 3 else COLORS[scene(n)] for n in range(FILES)], 3),
    "all jpeg of colors": ([jpeg(COLORS[scene(n)]) for n in range(FILES)], 3),
    "all jpeg": ([jpeg(scene(n, 2) * 255) for n in range(FILES)], 2),
    "specks": ([with_specks(n) for n in range(FILES)], 3),
}


@pytest.mark.parametrize("case", FLAWED)
def test_init_proposes_the_real_classes(tmp_path: Path, case: str) -> None:
    labels, count = FLAWED[case]
    draw(tmp_path / "in", labels)
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    recipe = load_recipe(proposal.recipe)
    assert len(classes_of(recipe)) == count
    findings = check(recipe)
    assert not findings.faults
    # Pixels inside a region have its class: flaws are at the edges only, or next to their class.
    for sample in (*manifest_of(recipe).labeled, *manifest_of(recipe).validation):
        assert sample.label
        label = read_label(sample.label, sample.encoding)
        truth = scene(int(sample.id), count)
        truth = cv2.resize(truth, label.shape[::-1], interpolation=cv2.INTER_NEAREST)
        inside = cv2.erode(truth, np.ones((9, 9))) == cv2.dilate(truth, np.ones((9, 9)))
        groups = [set(np.unique(label[inside & (truth == k)]).tolist()) - {255} for k in range(count)]
        assert all(len(group) == 1 for group in groups) and len(set(map(tuple, groups))) == count
    warning = next(line for line in proposal.warnings if "flaws" in line)
    says(warning, "pixels")
    if "colors" in case:
        counts = sum(findings.pixels.values())
        assert counts[-1] < 0.06 * counts.sum()  # not labeled


@pytest.mark.parametrize("quality", [30, 75])
def test_check_proposes_nearest_colors_for_jpeg_and_counts_them(tmp_path: Path, quality: int) -> None:
    labels = []
    for number in range(FILES):
        data = io.BytesIO()
        Image.fromarray(COLORS[scene(number)]).save(data, "JPEG", quality=quality)
        labels.append(np.array(Image.open(data)))
    draw(tmp_path, labels)
    classes = {name: color.tolist() for name, color in zip(("ground", "disk", "box"), COLORS, strict=True)}
    (fault,) = check_with(tmp_path, classes).faults
    assert "data.label_colors: {other: nearest}" in fault
    findings = check_with(tmp_path, classes, label_colors={"other": "nearest"})
    assert not findings.faults
    near, left = [line for line in findings.notes if "label files have" in line]
    says(near, "8 label files", "other: nearest")
    says(left, "label files")
    for number, sample in enumerate(manifest_of(load_recipe(tmp_path / "r.yaml")).labeled):
        assert sample.label
        label = read_label(sample.label, sample.encoding)
        wrong = (label != scene(int(sample.id))) & (label != 255)
        assert wrong.sum() <= 2 and (label == 255).mean() < 0.1, number


@given(seed=st.integers(0, 1000), colors=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_nearest_class_is_clear_or_none(seed: int, colors: int) -> None:
    rng = np.random.default_rng(seed)
    table = [(tuple(rng.integers(0, 256, 3).tolist()), int(rng.integers(0, 3))) for _ in range(colors)]
    close = np.clip(np.array([table[0][0]] * 20) + rng.integers(-40, 40, (20, 3)), 0, 255)
    values = close[:, 0] << 16 | close[:, 1] << 8 | close[:, 2]
    for color, k in zip(
        close.tolist(), nearest_classes(values.astype(np.int32), table).tolist(), strict=True
    ):
        by_class: dict[int, int] = {}
        for known, owner in table:
            far = max(abs(a - b) for a, b in zip(color, known, strict=True))
            by_class[owner] = min(far, by_class.get(owner, 999))
        ranked = sorted((far, owner) for owner, far in by_class.items())
        clear = ranked[0][0] <= 32 and all(far >= 3 * ranked[0][0] for far, _ in ranked[1:])
        # Two classes at distance 0 are both the nearest.
        assert k == (ranked[0][1] if clear else 255) or (ranked[0][0] == 0 and len(ranked) > 1)


@pytest.mark.parametrize("interpolation", [cv2.INTER_LINEAR, cv2.INTER_NEAREST])
def test_indices_that_were_resized_with_interpolation_are_reported(
    tmp_path: Path, interpolation: int
) -> None:
    labels = [
        cv2.resize(np.where(scene(n) == 2, 3, scene(n)), (150, 130), interpolation=interpolation)
        for n in range(FILES)
    ]
    draw(tmp_path, labels)
    lines = [line for line in check_with(tmp_path, ["a", "b", "c", "d"]).warnings if "resized" in line]
    assert len(lines) == (interpolation != cv2.INTER_NEAREST)
    if lines:
        says(lines[0], "1.png", "pixels", "nearest-neighbor", "outlines")
    proposal = propose_recipe(tmp_path, tmp_path / "p.yaml")
    assert any("resized" in line for line in proposal.warnings) == bool(lines)


@pytest.mark.parametrize("width", [1, 2])
def test_a_class_of_outlines_is_not_taken_for_interpolation(tmp_path: Path, width: int) -> None:
    """As in label maps of cells: 0 is ground, 2 inside, 1 the outline."""
    labels = [scene(number, 2) * 2 for number in range(FILES)]
    for number, label in enumerate(labels):
        cv2.circle(label, (30 + 3 * number, 35), 18, 1, width)
    draw(tmp_path, labels)
    assert not any("resized" in line for line in check_with(tmp_path, ["a", "b", "c"]).warnings)


@pytest.mark.parametrize("kind", ["values", "colors"])
def test_a_rare_class_stays_a_class(tmp_path: Path, kind: str) -> None:
    """16 pixels in three of eight files, and a line one pixel wide."""
    labels = [scene(number) for number in range(FILES)]
    for number in (0, 4, 6):
        labels[number][5:9, 5:9] = 3
        labels[number][70, 5:60] = 4
    table = np.vstack([COLORS, [[10, 200, 10], [200, 200, 0]]]).astype(np.uint8)
    draw(tmp_path / "in", labels if kind == "values" else [table[label] for label in labels])
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    recipe = load_recipe(proposal.recipe)
    assert len(classes_of(recipe)) == 5 and not any("flaws" in line for line in proposal.warnings)
    counts = sum(check(recipe).pixels.values())
    assert sorted(counts[:5])[:2] == [3 * 16, 3 * 55]


def test_a_class_of_outlines_stays_a_class(tmp_path: Path) -> None:
    labels = []
    for number in range(FILES):
        disk = scene(number, 2)
        edge = cv2.morphologyEx(disk, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        labels.append(np.where(edge, 128, disk * 255).astype(np.uint8))
    draw(tmp_path / "in", labels)
    recipe = load_recipe(propose_recipe(tmp_path / "in", tmp_path / "r.yaml").recipe)
    assert len(classes_of(recipe)) == 3


def test_nearly_equal_colors_become_the_class(tmp_path: Path) -> None:
    labels = [COLORS[scene(number)] for number in range(FILES)]
    labels[2][scene(2) == 1] = (202, 30, 30)
    draw(tmp_path / "in", labels)
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    recipe = load_recipe(proposal.recipe)
    assert len(classes_of(recipe)) == 3
    assert recipe.data.label_colors == {"class_c81e1e": ((202, 30, 30),)}
    says(next(line for line in proposal.warnings if "flaws" in line), "[202, 30, 30]", "1,009 pixels")


def test_check_names_the_cause_and_a_key_that_works(tmp_path: Path) -> None:
    draw(tmp_path, FLAWED["smoothed"][0])
    findings = check_with(tmp_path, ["ground", "disk"], label_values="binary")
    assert len(findings.faults) == 1
    says(findings.faults[0], "8 of 8", "data.label_values: {0: ground, 1: disk, 255: disk, other: ignore}")
    fixed = check_with(
        tmp_path, ["ground", "disk"], label_values={0: "ground", 255: "disk", "other": "ignore"}
    )
    assert not fixed.faults
    left_out = sum(np.count_nonzero((label > 0) & (label < 255)) for label in FLAWED["smoothed"][0])
    says(fixed.notes[1], f"{left_out:,} pixels", "8 label files")


def test_check_names_the_cause_for_colors(tmp_path: Path) -> None:
    draw(tmp_path, FLAWED["smoothed colors"][0])
    classes = {"ground": [0, 0, 0], "disk": [200, 30, 30], "box": [30, 30, 220]}
    findings = check_with(tmp_path, classes)
    assert len(findings.faults) == 1
    says(findings.faults[0], "8 of 8", "data.label_colors: {other: nearest}")
    for other in ("nearest", "ignore"):
        assert not check_with(tmp_path, classes, label_colors={"other": other}).faults


def palette_file(label: np.ndarray, order: list[int]) -> Image.Image:
    """`label` with its classes renumbered: value v has the color of class order[v]."""
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[label])
    image.putpalette([int(part) for k in order for part in COLORS[k]])
    return image


def test_palettes_that_number_colors_differently_are_read_by_color(tmp_path: Path) -> None:
    labels = [palette_file(scene(n), [0, 1, 2] if n % 2 else [0, 2, 1]) for n in range(FILES)]
    draw(tmp_path, labels)
    classes = dict(zip(["ground", "disk", "box"], COLORS.tolist(), strict=True))
    findings = check_with(tmp_path, classes)
    assert not findings.faults
    says(findings.notes[1], "4 of 8", "2.png", "data.label_format: index")
    truth = sum(np.bincount(scene(n).reshape(-1), minlength=3) for n in range(FILES))
    assert (sum(findings.pixels.values())[:3] == truth).all()
    by_value = check_with(tmp_path, classes, label_format="index")
    assert not by_value.faults and not by_value.notes[1:]
    assert (sum(by_value.pixels.values())[:3] != truth).any()


def test_palettes_that_disagree_without_known_colors_are_refused_with_both_tables(tmp_path: Path) -> None:
    draw(tmp_path, [palette_file(scene(n), [0, 1, 2] if n % 2 else [0, 2, 1]) for n in range(FILES)])
    findings = check_with(tmp_path, ["ground", "disk", "box"])
    says(findings.faults[0], "1 is [30, 30, 220]", "1 is [200, 30, 30]", "data.label_format: index")
    proposal = propose_recipe(tmp_path, tmp_path / "own.yaml")
    recipe = load_recipe(proposal.recipe)
    assert recipe.data.label_format == "color" and not check(recipe).faults
    says(
        next(line for line in proposal.warnings if "number" in line),
        "1 is [30, 30, 220]",
        "1 is [200, 30, 30]",
    )


@pytest.mark.parametrize(
    "palette",
    [
        pytest.param([part for k in range(256) for part in (k, k, k)], id="gray"),
        pytest.param([0] * 768, id="black"),
        pytest.param(COLORS.reshape(-1).tolist(), id="same"),
    ],
)
def test_palettes_that_say_nothing_else_change_nothing(tmp_path: Path, palette: list[int]) -> None:
    images = [Image.fromarray(scene(number)) for number in range(FILES)]
    for image in images:
        image.putpalette(palette)
    draw(tmp_path, images)
    findings = check_with(tmp_path, dict(zip(["ground", "disk", "box"], COLORS.tolist(), strict=True)))
    assert not findings.faults and not findings.warnings[1:] and not findings.notes[1:]
    truth = sum(np.bincount(scene(n).reshape(-1), minlength=3) for n in range(FILES))
    assert (sum(findings.pixels.values())[:3] == truth).all()


def rgba(number: int) -> Image.Image:
    label = scene(number)
    return Image.fromarray(np.dstack([COLORS[label], np.where(label, 255, 0).astype(np.uint8)]))


def test_transparent_pixels_are_counted_and_can_be_a_class(tmp_path: Path) -> None:
    draw(tmp_path, [rgba(number) for number in range(FILES)])
    share = np.mean([scene(number) == 0 for number in range(FILES)])
    classes = {"disk": [200, 30, 30], "box": [30, 30, 220]}
    line = next(text for text in check_with(tmp_path, classes).warnings if "alpha" in text)
    says(line, f"{share:.0%}", "8 label files", "data.label_transparent")
    proposal = propose_recipe(tmp_path, tmp_path / "own.yaml")
    assert sum("alpha" in warning for warning in proposal.warnings) == 1
    with_ground = {"ground": [9, 9, 9], **classes}
    findings = check_with(tmp_path, with_ground, label_transparent="ground")
    assert not any("alpha" in text for text in findings.warnings)
    truth = sum(np.bincount(scene(n).reshape(-1), minlength=3) for n in range(FILES))
    assert (sum(findings.pixels.values())[:3] == truth).all()
    as_drawn = check_with(tmp_path, {"ground": [0, 0, 0], **classes}, label_transparent="as_drawn")
    assert (sum(as_drawn.pixels.values())[:3] == truth).all()


def test_train_says_what_check_says(tmp_path: Path) -> None:
    draw(tmp_path, [rgba(number) for number in range(FILES)])
    check_with(tmp_path, {"disk": [200, 30, 30], "box": [30, 30, 220]})
    train(load_recipe(tmp_path / "r.yaml"), tmp_path / "run")
    assert "alpha channel" in (tmp_path / "run" / "journal.jsonl").read_text()


def test_masks_of_0_and_255_among_masks_of_0_and_1_are_reported(tmp_path: Path) -> None:
    masks = [scene(number, 2) for number in range(FILES)]
    mixed = [mask * (255 if number < 2 else 1) for number, mask in enumerate(masks)]
    draw(tmp_path, mixed)
    (line,) = [line for line in check_with(tmp_path, ["back", "crack"]).warnings if "just 0 and 255" in line]
    says(line, f"2 of {FILES}", "1.png", "{0: back, 1: crack, 255: crack}")
    values = {0: "back", 1: "crack", 255: "crack"}
    found = check_with(tmp_path, ["back", "crack"], label_values=values)
    assert not found.faults and "255" not in "\n".join(found.warnings)
    mixed[3] = mixed[3].copy()
    mixed[3][0] = 255  # here 255 is not labeled, so it may be so in the others
    draw(tmp_path, mixed)
    assert "just 0 and 255" not in "\n".join(check_with(tmp_path, ["back", "crack"]).warnings)
