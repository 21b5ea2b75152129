"""Streams of views of unlabeled images: decided by seed and position, weak and strong alike in their pixels."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from darseg.data import colors as colors_module
from darseg.data.augment import Augmentation, augment
from darseg.data.batches import StreamPlace
from darseg.data.classes import IGNORE
from darseg.data.colors import UNCHANGED, Colors, recolor
from darseg.data.dataset import Cache
from darseg.data.manifest import Sample
from darseg.data.unlabeled import Boxes, StrongViews, draw_box, stream_views
from darseg.data.views import Views
from darseg.errors import DataError, RecipeError
from wording import refused

HOW = Augmentation((24, 32), blur=False, fill=(1, 2, 3))
STRONG = StrongViews()
COUNT = 5


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    folder, rng = tmp_path_factory.mktemp("unlabeled"), np.random.default_rng(0)
    made = []
    for index in range(COUNT):
        image, label = folder / f"{index}.png", folder / f"{index}_label.png"
        height, width = 30 + index, 40
        cv2.imwrite(str(image), rng.integers(0, 256, (height, width, 3), np.uint8))
        cv2.imwrite(str(label), rng.integers(0, 3, (height, width), np.uint8))
        made.append(Sample(f"{index}", image, label if index % 2 else None))
    return tuple(made)


def take(samples: tuple[Sample, ...], steps: int, **options) -> list[Views]:
    settings = {"views": 2, "batch_size": 4, "seed": (3, 1)} | options
    stream = stream_views(samples, settings.pop("how", HOW), settings.pop("strong", STRONG), **settings)
    taken = list(itertools.islice(stream, steps))
    stream.close()
    return taken


def tensors(views: Views) -> list[torch.Tensor]:
    held = [views.weak, views.strong, views.inside, views.boxes, views.positions]
    return held if views.truth is None else [*held, views.truth]


def equal(first: list[Views], second: list[Views]) -> bool:
    return len(first) == len(second) and all(
        a.ids == b.ids and all(map(torch.equal, tensors(a), tensors(b)))
        for a, b in zip(first, second, strict=True)
    )


# --- the stream


def test_workers_start_and_cache_change_nothing(samples: tuple[Sample, ...]) -> None:
    whole = take(samples, 6, truth_every=2)
    assert equal(take(samples, 6, truth_every=2, place=StreamPlace(workers=5)), whole)
    assert equal(take(samples, 4, truth_every=2, start=2), whole[2:])
    assert equal(take(samples, 6, truth_every=2, load=Cache(1 << 20).load_image), whole)
    assert equal(take(samples, 6, truth_every=2, load=Cache(5000).load_image), whole)
    assert not equal(take(samples, 6, truth_every=2, seed=(3, 2)), whole)


def test_the_processes_shares_make_up_the_batch(samples: tuple[Sample, ...]) -> None:
    whole = take(samples, 3)
    halves = [take(samples, 3, place=StreamPlace(rank=rank, processes=2)) for rank in (0, 1)]
    for step, views in enumerate(whole):
        first, second = (half[step] for half in halves)
        assert first.ids + second.ids == views.ids
        assert torch.equal(torch.cat([first.weak, second.weak]), views.weak)
        assert torch.equal(torch.cat([first.strong, second.strong], 1), views.strong)
        assert torch.equal(torch.cat([first.boxes, second.boxes], 1), views.boxes)
        assert torch.equal(torch.cat([first.positions, second.positions]), views.positions)


def test_the_number_of_strong_views_changes_none_of_the_others(samples: tuple[Sample, ...]) -> None:
    none, single, three = (take(samples, 2, views=count) for count in (0, 1, 3))
    for step in range(2):
        assert none[step].strong.shape == (0, 4, 3, 24, 32)
        assert torch.equal(none[step].weak, three[step].weak)
        assert torch.equal(single[step].strong[0], three[step].strong[0])
        assert not torch.equal(three[step].strong[1], three[step].strong[0])


def test_the_weak_view_is_that_of_a_labeled_image(samples: tuple[Sample, ...]) -> None:
    """`augment` moves a label map along: here it holds where pixels come from."""
    (views,) = take(samples, 1, truth_every=1)
    for row, name in enumerate(views.ids):
        image = cv2.imread(str(samples[int(name)].image))[..., ::-1]
        zeros = np.zeros(image.shape[:2], np.uint8)
        generator = np.random.default_rng([3, 1, 1, int(views.positions[row])])
        weak, moved = augment(image, zeros, HOW, generator=generator)
        assert np.array_equal(views.weak[row].permute(1, 2, 0).numpy(), weak)
        assert np.array_equal(views.inside[row].numpy(), moved == 0)
    assert views.inside.any() and not views.inside.all()


def test_colors_of_labeled_images_change_only_inside() -> None:
    image, label = picture(), np.arange(48 * 60, dtype=np.uint32).astype(np.uint8).reshape(48, 60)
    how = replace(HOW, scale=(0.2, 0.45))
    for seed in range(20):
        plain, colored = (
            augment(image, label, replace(how, colors=colors), generator=np.random.default_rng(seed))
            for colors in (None, Colors(jitter_share=1.0))
        )
        assert np.array_equal(plain[1], colored[1])
        zeros = np.zeros_like(label)
        outside = augment(image, zeros, how, generator=np.random.default_rng(seed))[1] == IGNORE
        changed = (plain[0] != colored[0]).any(2)
        assert changed.any() and outside.any() and not (changed & outside).any()


def test_without_changes_of_color_the_strong_view_is_the_weak_view(samples: tuple[Sample, ...]) -> None:
    (views,) = take(samples, 1, strong=StrongViews(UNCHANGED, Boxes(share=0.0)))
    assert torch.equal(views.strong[0], views.weak) and torch.equal(views.strong[1], views.weak)
    assert not views.boxes.any()


def test_padding_keeps_its_color_in_strong_views(samples: tuple[Sample, ...]) -> None:
    always = Colors(jitter_share=1.0, gray_share=1.0, blur_share=1.0, blur=(2.0, 2.0))
    (views,) = take(samples, 1, strong=StrongViews(always), how=replace(HOW, scale=(0.3, 0.5)))
    outside = ~views.inside
    assert outside.any()
    weak = views.weak.permute(0, 2, 3, 1)
    for view in range(2):
        pixels = views.strong[view].permute(0, 2, 3, 1)
        assert torch.equal(pixels[outside], weak[outside])
        assert not torch.equal(pixels[views.inside], weak[views.inside])


def test_truth_is_read_every_so_many_steps_where_it_is_known(samples: tuple[Sample, ...]) -> None:
    taken = take(samples, 4, truth_every=2)
    assert [views.truth is not None for views in taken] == [True, False, True, False]
    for views in taken[::2]:
        assert views.truth is not None
        for row, name in enumerate(views.ids):
            known = views.truth[row] != IGNORE
            assert bool(known.any()) == bool(int(name) % 2)
            assert not (known & ~views.inside[row]).any()
    unlabeled = tuple(replace(sample, label=None) for sample in samples)
    assert all(views.truth is None for views in take(unlabeled, 2, truth_every=1))


def test_a_missing_image_is_an_error_at_its_step(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    missing = (replace(samples[0], image=tmp_path / "gone.png"),)
    with refused(DataError, "gone.png"):
        take(missing, 1)


# --- colors


def picture() -> np.ndarray:
    noise = np.random.default_rng(5).integers(0, 256, (12, 10, 3), np.uint8)
    return cv2.resize(noise, (60, 48), interpolation=cv2.INTER_LINEAR)


@pytest.mark.parametrize("operation, enhance", [(0, "Brightness"), (1, "Contrast"), (2, "Color")])
@pytest.mark.parametrize("amount", [-1.0, -0.4, 0.3, 0.5])
def test_jitter_against_pillow(operation: int, enhance: str, amount: float) -> None:
    image = picture()
    wanted = np.array(getattr(ImageEnhance, enhance)(Image.fromarray(image)).enhance(1 + amount))
    changed = colors_module._jitter(image, operation, amount=amount)
    # Pillow cuts fractions off, and rounds gray otherwise.
    assert np.abs(changed.astype(int) - wanted).max() <= 2


@pytest.mark.parametrize("amount", [-0.25, 0.1, 0.25])
def test_hue_turns_a_share_of_the_circle(amount: float) -> None:
    """Against Pillow; and red turned by a third is green."""
    image = picture()
    shifted = np.array(Image.fromarray(image).convert("HSV"))
    shifted[..., 0] += np.uint8(round(amount * 256) % 256)
    wanted = np.array(Image.fromarray(shifted, "HSV").convert("RGB")).astype(int)
    changed = colors_module._jitter(image, 3, amount=amount).astype(int)
    assert np.abs(changed - wanted).mean() < 3
    red = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    green = colors_module._jitter(red, 3, amount=1 / 3)
    assert np.abs(green.astype(int) - (0, 255, 0)).max() <= 4


def test_every_call_takes_the_same_number_of_draws() -> None:
    states = []
    for how in (UNCHANGED, Colors(), Colors(jitter_share=1.0, gray_share=1.0, blur_share=1.0)):
        generator = np.random.default_rng(7)
        image = picture()
        changed = recolor(image, how, generator=generator)
        assert changed is not image and np.array_equal(image, picture())
        states.append(generator.bit_generator.state["state"])
    assert states[0] == states[1] == states[2]


def test_shares_of_images_that_change() -> None:
    """With only gray: a share of about 0.2 of 600 images, four standard errors wide."""
    generator, how = np.random.default_rng(1), replace(UNCHANGED, gray_share=0.2)
    image = np.array([[[10, 200, 90]]], np.uint8)
    gray = sum(len(set(recolor(image, how, generator=generator)[0, 0])) == 1 for _ in range(600))
    assert abs(gray / 600 - 0.2) < 4 * (0.2 * 0.8 / 600) ** 0.5


@pytest.mark.parametrize(
    "options, part",
    [
        ({"jitter": (-0.1, 0, 0, 0)}, "color jitter"),
        ({"jitter": (0, 0, 0, 0.6)}, "hue jitter 0.6"),
        ({"blur": (0.0, 2.0)}, "blur"),
        ({"gray_share": 1.5}, "gray_share 1.5"),
    ],
)
def test_colors_that_are_not_valid(options: dict, part: str) -> None:
    with refused(RecipeError, part):
        Colors(**options)


# --- boxes


def boxes(how: Boxes, crop: tuple[int, int] = (100, 120), count: int = 800) -> np.ndarray:
    generator = np.random.default_rng(4)
    return np.array([draw_box(crop, how, generator=generator) for _ in range(count)])


@pytest.mark.parametrize("how", [Boxes(), Boxes(1.0, (0.5, 0.5), None), Boxes(1.0, (0.1, 1.0))])
@pytest.mark.parametrize("crop", [(100, 120), (8, 400)])
def test_boxes_lie_inside_the_crop(how: Boxes, crop: tuple[int, int]) -> None:
    drawn = boxes(how, crop)
    assert (drawn >= 0).all() and (drawn[:, 2] <= crop[0]).all() and (drawn[:, 3] <= crop[1]).all()
    assert (drawn[:, 2:] >= drawn[:, :2]).all()


def test_boxes_have_the_published_shares_areas_and_aspects() -> None:
    drawn = boxes(Boxes())
    height, width = drawn[:, 2] - drawn[:, 0], drawn[:, 3] - drawn[:, 1]
    drawn_share = (height > 0).mean()
    assert abs(drawn_share - 0.5) < 4 * 0.5 / 800**0.5
    height, width = height[height > 0], width[width > 0]
    area = height * width / (100 * 120)
    assert 0.01 < area.min() < 0.06 and 0.34 < area.max() <= 0.4  # sides are cut off to whole pixels
    assert 0.25 < (height / width).min() < 0.5 and 2 < (height / width).max() < 3.8


def test_half_boxes_cover_half_of_the_crop() -> None:
    drawn = boxes(Boxes(1.0, (0.5, 0.5), None))
    height, width = drawn[:, 2] - drawn[:, 0], drawn[:, 3] - drawn[:, 1]
    assert np.abs(height * width / (100 * 120) - 0.5).max() < 0.01
    assert height.min() < 53 and height.max() > 95  # from half of the height to all of it


@pytest.mark.parametrize(
    "options, part",
    [
        ({"share": 1.2}, "share of views with a box, 1.2"),
        ({"area": (0.0, 0.4)}, "areas of boxes"),
        ({"aspect": (2.0, 1.0)}, "aspects of boxes"),
    ],
)
def test_boxes_that_are_not_valid(options: dict, part: str) -> None:
    with refused(RecipeError, part):
        Boxes(**options)
