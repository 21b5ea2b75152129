"""Streams of batches: decided by seed and position alone, on any thread; errors come when due."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.data import dataset
from darseg.data.augment import Augmentation
from darseg.data.batches import Batch, StreamPlace, sample_index, stream_batches
from darseg.data.classes import IGNORE, class_set
from darseg.data.dataset import Cache, draw_example, load_example, load_image
from darseg.data.encoding import LabelEncoding
from darseg.data.manifest import Sample
from darseg.errors import DataError
from wording import refused

CLASSES = class_set(["field", "road", "house"])
HOW = Augmentation((9, 13))
COUNT = 7


def make(folder: Path, name: str, image: np.ndarray, label: np.ndarray) -> Sample:
    sample = Sample(name, folder / f"{name}.png", folder / f"{name}_label.png")
    assert cv2.imwrite(str(sample.image), image[..., ::-1]) and cv2.imwrite(str(sample.label), label)
    return sample


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    folder, rng = tmp_path_factory.mktemp("samples"), np.random.default_rng(0)
    return tuple(
        make(
            folder,
            f"{index}",
            image=rng.integers(0, 256, (20 + index, 24, 3), np.uint8),
            label=rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (20 + index, 24)),
        )
        for index in range(COUNT)
    )


def take(
    samples, steps: int, *, batch=3, seed=(1, 2), start=0, workers=2, how=HOW, load=load_example
) -> list[Batch]:
    stream = stream_batches(
        samples,
        CLASSES,
        how,
        batch_size=batch,
        seed=seed,
        start=start,
        place=StreamPlace(workers=workers),
        load=load,
    )
    batches = list(itertools.islice(stream, steps))
    stream.close()
    return batches


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.ids == b.ids and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(first, second, strict=True)
    )


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_batch_is_what_it_says(samples):
    for batch in take(samples, 3, batch=4):
        assert batch.images.shape == (4, 3, 9, 13) and batch.images.dtype == torch.uint8
        assert batch.labels.shape == (4, 9, 13) and batch.labels.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last) and batch.labels.is_contiguous()
        assert len(batch.ids) == 4 and set(batch.ids) <= {sample.id for sample in samples}
        assert set(batch.labels.unique().tolist()) <= {0, 1, 2, IGNORE}


def test_seed_and_position_decide(samples):
    """The stream written out: position p is one sample, augmented by a generator of its own."""
    position = 0
    for batch in take(samples, 8, seed=(5, 0, 1)):
        for image, label, name in zip(batch.images, batch.labels, batch.ids, strict=True):
            sample = samples[sample_index(position, COUNT, (5, 0, 1))]
            example = draw_example(
                sample, CLASSES, HOW, generator=np.random.default_rng([5, 0, 1, 1, position])
            )
            assert name == sample.id == example.id
            assert np.array_equal(image.permute(1, 2, 0).numpy(), example.image)
            assert np.array_equal(label.numpy(), example.label)
            position += 1


def test_equal_seeds_give_equal_streams_and_others_do_not(samples):
    stream = take(samples, 6)
    assert equal(stream, take(samples, 6))
    for seed in ((1, 3), (2, 2), (1, 2, 1)):
        assert not equal(stream, take(samples, 6, seed=seed))


@pytest.mark.parametrize("batch", [1, 3, COUNT, 2 * COUNT + 1])
def test_a_stream_begins_at_any_step(samples, batch: int):
    stream = take(samples, 9, batch=batch)
    for start in (1, 4, 8):
        assert equal(take(samples, 9 - start, batch=batch, start=start), stream[start:])


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_the_number_of_threads_changes_nothing(samples, workers: int):
    assert equal(take(samples, 7, workers=workers), take(samples, 7, workers=2))


def test_the_batch_size_changes_only_where_batches_end(samples):
    singles, triples = take(samples, 12, batch=1), take(samples, 4, batch=3)
    assert [name for batch in singles for name in batch.ids] == [
        name for batch in triples for name in batch.ids
    ]
    assert torch.equal(torch.cat([b.images for b in singles]), torch.cat([b.images for b in triples]))


def test_an_epoch_shows_every_sample_once_and_the_next_another_crop(samples):
    batches = take(samples, 3 * COUNT, batch=1)
    epochs = [batches[first : first + COUNT] for first in range(0, 3 * COUNT, COUNT)]
    orders = [tuple(batch.ids[0] for batch in epoch) for epoch in epochs]
    assert all(sorted(order) == sorted(sample.id for sample in samples) for order in orders)
    assert len(set(orders)) == 3
    by_id = [{batch.ids[0]: batch.images for batch in epoch} for epoch in epochs]
    assert not any(torch.equal(by_id[0][sample.id], by_id[1][sample.id]) for sample in samples)


def test_a_batch_larger_than_the_list_goes_round_it(samples):
    (batch,) = take(samples, 1, batch=2 * COUNT + 3)
    counts = Counter(batch.ids)
    assert len(counts) == COUNT and set(counts.values()) <= {2, 3}
    assert take(samples[:1], 2, batch=4)[1].ids == ("0",) * 4


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 2**64), min_size=1, max_size=3), st.integers(0, 1000))
def test_every_epoch_is_a_permutation(count: int, seed: list[int], epoch: int):
    order = [sample_index(epoch * count + place, count, seed) for place in range(count)]
    assert sorted(order) == list(range(count))


def test_permutations_differ_and_are_fair():
    first = Counter()
    orders = set()
    for epoch in range(600):
        order = tuple(sample_index(epoch * 6 + place, 6, (3,)) for place in range(6))
        orders.add(order)
        first[order[0]] += 1
    assert len(orders) > 350  # of 720; 600 draws of these are expected to show 407
    assert all(abs(first[index] - 100) < 40 for index in range(6))


@pytest.mark.parametrize("workers", [1, 8])
def test_errors_of_a_sample_come_when_its_batch_is_due(samples, tmp_path, workers: int):
    broken = [*samples[:-1], Sample("gone", tmp_path / "gone.png", tmp_path / "gone_label.png")]
    position = [sample_index(place, COUNT, (1, 2)) for place in range(COUNT)].index(COUNT - 1)
    stream = stream_batches(
        broken, CLASSES, HOW, batch_size=1, seed=(1, 2), place=StreamPlace(workers=workers)
    )
    for place in range(position):
        assert next(stream).ids == (samples[sample_index(place, COUNT, (1, 2))].id,)
    with pytest.raises(DataError, match=r"gone\.png: this file does not exist"):
        next(stream)
    assert not own_threads()
    with pytest.raises(StopIteration):
        next(stream)


def test_closing_stops_the_threads(samples):
    assert not own_threads()
    stream = stream_batches(samples, CLASSES, HOW, batch_size=2, seed=(1,), place=StreamPlace(workers=3))
    assert not own_threads()  # nothing begins before the first batch is wanted
    next(stream)
    assert own_threads()
    stream.close()
    assert not own_threads()
    stream.close()


def test_a_lost_stream_stops_its_threads(samples):
    stream = stream_batches(samples, CLASSES, HOW, batch_size=2, seed=(1,), place=StreamPlace(workers=3))
    next(stream)
    del stream
    assert not own_threads()


def test_only_a_few_batches_are_prepared_ahead(samples, monkeypatch):
    """Enough to keep all threads busy; no more, so memory does not grow while training is slower than reading."""
    asked = []
    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *call: asked.append(call) or submit(*call))
    for batch, workers, ahead in ((4, 4, 2), (1, 8, 16), (16, 2, 2)):
        asked.clear()
        take(samples, 5, batch=batch, workers=workers)
        assert len(asked) == (5 + ahead) * batch


def test_pinned_memory_is_requested(samples, monkeypatch):
    """Without a GPU there is no pinned memory: what is asked for is seen, and is for both tensors."""
    asked = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory, **kind: asked.append(pin_memory) or empty(*size, **kind)
    )
    stream = stream_batches(samples, CLASSES, HOW, batch_size=3, seed=(1, 2), place=StreamPlace(pin=True))
    pinned = [next(stream) for _ in range(2)]
    stream.close()
    assert asked and all(asked)
    asked.clear()
    assert equal(pinned, take(samples, 2)) and asked and not any(asked)


# The cache of decoded examples

EVERYTHING = 1 << 30


def count_reading(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Count how often each image is decoded from now on."""
    read, counts = dataset.read_image, Counter()

    def counted(path: Path, *rule: object) -> np.ndarray:
        counts[path.stem] += 1
        return read(path, *rule)

    monkeypatch.setattr(dataset, "read_image", counted)
    return counts


@pytest.mark.parametrize("limit", [0, 3 * 4 * 24 * 24, EVERYTHING])
@pytest.mark.parametrize("workers", [1, 8])
def test_a_cache_of_any_size_changes_no_batch(samples, limit: int, workers: int):
    cache = Cache(limit)
    assert equal(take(samples, 12, workers=workers, load=cache.load), take(samples, 12))
    assert equal(take(samples, 3, start=9, load=cache.load), take(samples, 3, start=9))  # now filled


def test_a_cache_decodes_each_sample_once(samples, monkeypatch):
    counts, cache = count_reading(monkeypatch), Cache(EVERYTHING)
    for epoch in range(4):
        for sample in samples:
            assert cache.load(sample, CLASSES).id == sample.id
        assert counts == {sample.id: 1 for sample in samples}, epoch


def test_a_cache_stays_within_its_limit(samples, monkeypatch):
    """An example takes 4 bytes per pixel. One that does not fit is decoded each time; a smaller one may fit later."""
    sizes = [4 * (20 + index) * 24 for index in range(COUNT)]
    counts, cache = count_reading(monkeypatch), Cache(sizes[6] + sizes[4] + sizes[0])
    for _ in range(3):
        for index in (6, 4, 3, 0, 1):
            cache.load(samples[index], CLASSES)
    assert counts == {"6": 1, "4": 1, "3": 3, "0": 1, "1": 3}
    nothing = Cache(0)
    counts.clear()
    for _ in range(2):
        nothing.load(samples[0], CLASSES)
    assert counts == {"0": 2}


def test_an_image_with_another_label_is_another_entry(samples, tmp_path):
    """As in the next round, which has new pseudo labels for the same images."""
    label = tmp_path / "label.png"
    assert cv2.imwrite(str(label), np.full((20, 24), 2, np.uint8))
    cache = Cache(EVERYTHING)
    before = cache.load(samples[0], CLASSES)
    after = cache.load(replace(samples[0], label=label), CLASSES)
    assert (after.label == 2).all() and not (before.label == 2).all()
    assert np.array_equal(after.image, before.image)


@pytest.mark.parametrize("first", ["image", "example"])
def test_a_cache_decodes_an_image_once_for_both_uses(samples, monkeypatch, first: str):
    """As in labeling, then in training on the labels."""
    counts, cache = count_reading(monkeypatch), Cache(4 * 20 * 24)  # image and label map fit exactly
    for use in (first, "image", "example", first):
        if use == "image":
            assert np.array_equal(cache.load_image(samples[0]), load_image(samples[0]))
        else:
            assert np.array_equal(
                cache.load(samples[0], CLASSES).label, load_example(samples[0], CLASSES).label
            )
    assert counts["0"] == 1 + 4  # and once for each comparison
    assert cache.kept == 3 * 20 * 24


def test_a_round_drops_label_maps_and_keeps_images_within_its_limit(samples, monkeypatch):
    sizes = [3 * (20 + index) * 24 for index in range(COUNT)]
    counts, cache = count_reading(monkeypatch), Cache(EVERYTHING)
    for index in (0, 1, 2):
        cache.load(samples[index], CLASSES)
    cache.restart(EVERYTHING)
    assert cache.load(samples[0], CLASSES).image is cache.load_image(samples[0]) and counts["0"] == 1
    cache.restart(sizes[0] + sizes[1] + 20 * 24)  # no room for all three
    assert cache.kept <= sizes[0] + sizes[1] + 20 * 24
    cache.restart(0)
    assert cache.kept == 0
    cache.load(samples[1], CLASSES)
    assert cache.kept == 0 and counts["1"] == 2


def test_examples_in_a_cache_are_read_only(samples):
    cache = Cache(EVERYTHING)
    for _ in range(2):
        example = cache.load(samples[0], CLASSES)
        for pixels in (example.image, example.label):
            with pytest.raises(ValueError, match="read-only"):
                pixels[0] = 0


def test_an_example_loaded_by_several_threads_counts_once(samples):
    size = 4 * 20 * 24
    cache, barrier = Cache(size + 4 * 21 * 24), threading.Barrier(8)

    def ask(_: int) -> np.ndarray:
        barrier.wait()
        return cache.load(samples[0], CLASSES).image

    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(ask, range(8)))
    assert all(np.array_equal(image, images[0]) for image in images)
    assert cache.load(samples[1], CLASSES) is cache.load(samples[1], CLASSES)  # it still fits


def test_a_cache_does_not_keep_errors(samples, tmp_path):
    path, cache = tmp_path / "late.png", Cache(EVERYTHING)
    late = replace(samples[0], image=path)
    with refused(DataError, str(path)):
        cache.load(late, CLASSES)
    path.write_bytes(samples[0].image.read_bytes())
    assert cache.load(late, CLASSES).image.shape == (20, 24, 3)


# Single examples


def test_an_example_holds_image_and_label_unchanged(samples):
    example = load_example(samples[2], CLASSES)
    assert example.id == "2" and example.image.shape == (22, 24, 3) and example.label.shape == (22, 24)
    assert np.array_equal(example.image, cv2.imread(str(samples[2].image))[..., ::-1])


def test_the_ignore_value_of_the_recipe_is_read_as_255(tmp_path):
    label = np.array([[0, 1], [2, 11]], np.uint8)
    sample = replace(
        make(tmp_path, "a", image=np.zeros((2, 2, 3), np.uint8), label=label),
        encoding=LabelEncoding(ignore=11),
    )
    example = load_example(sample, CLASSES)
    assert example.label.tolist() == [[0, 1], [2, IGNORE]]


def test_samples_that_cannot_be_loaded_are_refused(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    with refused(DataError, str(tmp_path / "a.png"), "no label map"):
        load_example(Sample("a", tmp_path / "a.png"), CLASSES)
    turned = make(tmp_path, "b", image=image, label=np.zeros((6, 4), np.uint8))
    with refused(DataError, str(turned.label), "6x4", str(turned.image), "4x6", "darseg check"):
        load_example(turned, CLASSES)
    unknown = make(tmp_path, "c", image=image, label=np.full((4, 6), 3, np.uint8))
    with refused(DataError, str(unknown.label), "3 (24 pixels)", "data.ignore", "data.label_values"):
        load_example(unknown, CLASSES)
