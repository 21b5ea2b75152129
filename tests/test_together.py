"""Images that go through the network together: as one by one, in fixed groups, in constant memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from darseg.data.manifest import Sample
from darseg.data.pipeline import AHEAD, Finish, Flow, overlapped_groups
from darseg.data.prediction import FINE, FLOAT16, ConfidenceScale, Prediction
from darseg.errors import DataError, NumericsError
from darseg.model.decide import decide, decide_later, decide_strips
from darseg.model.network import Network, Output
from darseg.model.predict import predict, predict_for_labeling
from darseg.model.together import Picture, Together
from darseg.model.windows import Average, Protocol, group_size
from darseg.pseudo.assign import LabelRule
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.labelset import assign_labels, count_predictions, prediction_path
from darseg.pseudo.thresholds import choose_dars
from darseg.run.label_samples import network_predictor
from darseg.training.processes import Processes
from test_protocol import decisive_network
from wording import refused

GPU = torch.device("cuda")
SIZES = [(30, 40), (30, 40), (33, 49), (20, 33), (90, 130), (30, 40), (33, 60), (33, 60), (1, 7), (30, 40)]
"""Heights and widths of pictures: some fit into a window of 33x49, one is many times as large."""


@pytest.fixture(scope="module")
def network() -> Network:
    return decisive_network()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    images = []
    for size in SIZES:
        coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        images.append(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC))
    return images


def together_of(
    network: Network, protocol: Protocol | None, average: Average, *, later: bool = False
) -> Together:
    """Predicts groups; with `later` by the arithmetic of a GPU."""
    together = Together(network, protocol, average=average, scale=FINE)
    together._at_once = not later
    return together


def predicted(together: Together, images: Sequence[np.ndarray]) -> dict[int, Prediction]:
    """Index → prediction of a group."""
    device = torch.device("cpu")
    pictures = ((index, Picture.of(image, str(index), device)) for index, image in enumerate(images))
    finishes = list(together.predict_each(pictures))
    predictions = {index: finish() for index, finish in finishes}
    assert len(predictions) == len(finishes) == len(images)
    return predictions


@pytest.mark.parametrize("later", [False, True], ids=["on a CPU", "as on a GPU"])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize(
    "protocol",
    [
        Protocol((33, 49), windows_at_once=6),
        Protocol((33, 49), mirror=False, windows_at_once=4),
        Protocol((33, 33), base_size=48, scales=(0.75, 1.5), windows_at_once=20),
        Protocol("whole", scales=(1.0, 1.5), windows_at_once=3),
        None,
    ],
    ids=["mirror", "no mirror", "scales", "whole", "a window for each"],
)
def test_grouped_is_as_one_by_one(
    network: Network, images: list[np.ndarray], protocol: Protocol | None, average: Average, later: bool
) -> None:
    group = predicted(together_of(network, protocol, average, later=later), images)
    for index, image in enumerate(images):
        if average == "logits":
            window = tuple(network.sides.up(side) for side in image.shape[:2])
            alone = predict_for_labeling(network, image, protocol or Protocol(window), scale=FINE)
        else:
            alone = predict(network, image, protocol)
        # Only pixels whose two best classes are equally good may be decided otherwise: log-odds near 0.
        differs = group[index].classes != alone.classes
        assert (np.abs(alone.confidence[differs] - 0.5) < 1e-3).all()
        np.testing.assert_allclose(group[index].confidence, alone.confidence, atol=1e-3)
        assert group[index].classes.shape == image.shape[:2]


def test_like_images_share_passes_and_a_large_one_has_its_own(
    network: Network, images: list[np.ndarray]
) -> None:
    """SIZES by hand: seven fit into one window, two are two windows wide, one is 4 x 4 windows."""
    windows: list[int] = []
    hook = network.register_forward_hook(lambda _, inputs, __: windows.append(len(inputs[0])))
    try:
        together = together_of(network, Protocol((33, 49), windows_at_once=6), "logits")
        assert together.images == 6
        predicted(together, images[:6])
        # With mirror images: five small ones together; 6, 6 and 4 windows of the large one.
        assert sorted(windows) == [8, 10, 12, 12]
        windows.clear()
        predicted(together, images)
        assert sorted(windows) == [2, 8, 8, 12, 12, 12]
    finally:
        hook.remove()


def test_sizes_of_groups_follow_the_device_and_the_window() -> None:
    cpu, large, small = torch.device("cpu"), Protocol((713, 713)), Protocol((209, 209))
    assert group_size(large, cpu) == group_size(small, cpu) == group_size(None, cpu) == 1
    assert (group_size(large, GPU), group_size(small, GPU)) == (4, 48)
    assert group_size(Protocol((713, 713), mirror=False), GPU) == 8
    assert (
        group_size(Protocol((33, 33)), GPU) == 64
    )  # bounded, since a group's images may wait for each other
    assert group_size(Protocol((2049, 2049)), GPU) == 1
    assert group_size(None, GPU) == group_size(Protocol("whole"), GPU) > 1
    for device in (cpu, GPU):
        assert group_size(Protocol((713, 713), windows_at_once=7), device) == 7
    with refused(DataError, "windows_at_once", "0"):
        Protocol((33, 33), windows_at_once=0)


@pytest.mark.parametrize("later", [False, True], ids=["on a CPU", "as on a GPU"])
def test_an_image_without_numbers_is_named(
    network: Network, images: list[np.ndarray], later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Network, windows: torch.Tensor) -> Output:
        scores = torch.zeros(len(windows), 4, *windows.shape[2:])
        scores[1] = float("nan")
        return Output(scores, None)

    monkeypatch.setattr(Network, "forward", broken)
    together = together_of(
        network, Protocol((33, 49), mirror=False, windows_at_once=6), "logits", later=later
    )
    with refused(NumericsError, "1: "):
        predicted(together, images[:3])


@pytest.mark.parametrize("scale", [FLOAT16, FINE], ids=lambda scale: scale.name)
@pytest.mark.parametrize("probabilities", [False, True], ids=["logits", "probabilities"])
def test_decisions_of_several_images_are_those_of_each(scale: object, probabilities: bool) -> None:
    # Whole vectors of a processor, so that torch.softmax has no rest, for which it uses another exp.
    scores = torch.randn(5, 3, 8, 64, generator=torch.Generator().manual_seed(0)) * 3
    scores[2, 1, 3, :9] = scores[:, 1, 3, :9].amax(0)  # a tie: the first of both
    if probabilities:
        scores = scores.softmax(dim=0)
    several = decide_later(scores.clone(), scale=scale, probabilities=probabilities, names=["a", "b", "c"])
    for index, finish in enumerate(several):
        alone = decide(scores[:, index].contiguous(), scale, probabilities=probabilities)
        np.testing.assert_array_equal(finish().classes, alone.classes)
        np.testing.assert_array_equal(finish().codes, alone.codes)

    scores[:, 1, 2, 3] = 2.0 if probabilities else 1e5 * torch.arange(5) if scale is FLOAT16 else float("nan")
    first, second, third = decide_later(
        scores, scale=scale, probabilities=probabilities, names=["a", "b", "c"]
    )
    assert first().classes.shape == third().classes.shape == (8, 64)
    with refused(DataError, "b:", *(["probabilities"] if probabilities else []), vary=[r"from \S+ to"]):
        second()


@pytest.mark.parametrize("scale", [FLOAT16, FINE], ids=lambda scale: scale.name)
def test_probabilities_that_are_not_numbers_are_refused(scale: ConfidenceScale) -> None:
    scores = torch.full((4, 2, 3, 5), 0.25)
    scores[:, 1, 2, 3] = float("nan")
    first, second = decide_later(scores.clone(), scale=scale, probabilities=True, names=["a", "b"])
    assert first().classes.shape == (3, 5)
    with refused(DataError, "b: confidences are not numbers"):
        second()
    alone = scores[:, 1].contiguous()
    with refused(DataError, "b: confidences are not numbers"):
        decide_strips(
            lambda top, bottom, out: out.copy_(alone[:, top:bottom]),
            alone,
            scale=scale,
            probabilities=True,
            name="b",
        )


# Labeling in groups.


class Mingling(Network):
    """A network whose logits depend on all windows of a pass, far beyond the last bits."""

    def forward(self, images: torch.Tensor) -> Output:
        output = super().forward(images)
        return Output(output.main * (1 + 0.1 * len(images)) + output.main.mean(0, keepdim=True), None)


@pytest.fixture
def mingling(network: Network, monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setattr(network, "__class__", Mingling)
    return network


@pytest.fixture
def samples(images: list[np.ndarray], tmp_path: Path) -> list[Sample]:
    samples = []
    for index, image in enumerate(images):
        path = tmp_path / f"{index}.png"
        cv2.imwrite(str(path), image)
        samples.append(Sample(str(index), path))
    return samples


PROTOCOL = Protocol((33, 49), windows_at_once=4)


class Labeling:
    """Counts and assigns in a folder, as one or several processes."""

    def __init__(self, network: Network, folder: Path, *, twice: bool = False) -> None:
        self.network, self.folder, self.twice = network, folder, twice
        self.predictions, self.labels = folder / "predictions", folder / "labels"

    def run(self, samples: Sequence[Sample], processes: int = 1, stop_after: int | None = None) -> None:
        waits = None if self.twice else self.predictions
        predictor = network_predictor(self.network, PROTOCOL, FLOAT16, folder=waits)
        shares = [Processes(rank, processes).share(samples, predictor.images) for rank in range(processes)]
        assert sorted(sample.id for share in shares for sample in share) == sorted(s.id for s in samples)
        parts = [count_predictions(share, 4, predictor) for share in shares]
        histogram = sum(part.counts for part in parts)
        rule = LabelRule(
            choose_dars(type(parts[0])(histogram), ClassDistribution(np.full(4, 0.25)), 0.5), 0, 1
        )
        advanced: list[None] = []
        for share in shares:
            assign_labels(share, rule, predictor, labels=self.labels, advance=lambda: advanced.append(None))
        assert len(advanced) == len(samples)

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in sorted(self.folder.glob("*/*"))
        }


@pytest.mark.parametrize("twice", [False, True], ids=["predictions wait", "predicted twice"])
def test_any_number_of_processes_and_a_stop_anywhere_give_the_same_bytes(
    mingling: Network, samples: list[Sample], tmp_path: Path, twice: bool
) -> None:
    whole = Labeling(mingling, tmp_path / "whole", twice=twice)
    whole.run(samples)
    expected = whole.files()
    assert len(expected) == len(samples) * (1 if twice else 2)

    # The network would show it if a group had other members.
    alone = Labeling(mingling, tmp_path / "alone", twice=twice)
    alone.run(samples[1:])
    assert any(alone.files()[name] != expected[name] for name in alone.files())

    two = Labeling(mingling, tmp_path / "two", twice=twice)
    two.run(samples, processes=2)
    assert two.files() == expected

    for path in [
        *(prediction_path(whole.predictions, sample.id) for sample in samples[2:6] if not twice),
        *(whole.labels / f"{index}.png" for index in (0, 5, 6, 9)),
    ]:
        path.unlink()
    whole.run(samples)
    assert whole.files() == expected


def test_without_groups_the_same_predictions_are_made_one_by_one(
    network: Network, samples: list[Sample], images: list[np.ndarray], tmp_path: Path
) -> None:
    """On a CPU, unless the recipe asks for groups: to the byte what `predict_for_labeling` gives."""
    protocol = Protocol((33, 49))
    predictor = network_predictor(network, protocol, FLOAT16, folder=tmp_path)
    count_predictions(samples, 4, predictor)
    for sample, image in zip(samples, images, strict=True):
        read = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # as the file holds it
        stored = prediction_path(tmp_path, sample.id).read_bytes()
        assert stored == predict_for_labeling(network, read, protocol).to_bytes()


# Memory.


@pytest.mark.parametrize("weight", [1, 40, 1000])
def test_what_is_on_the_way_is_bounded_by_its_bytes(weight: int) -> None:
    """A slow network and slow writers: what is read and not yet written stays within the flow."""
    flow = Flow(threads=3, items=16, bytes=100, weigh=lambda content: content)
    lock, ahead, behind, most = threading.Lock(), [0], [0], [0, 0]

    def read(_: int) -> int:
        with lock:
            ahead[0] += 1
            most[0] = max(most[0], ahead[0])
        return weight

    def work(contents: Iterator[tuple[int, int]]) -> Iterator[tuple[int, Finish[int]]]:
        for item, content in contents:
            time.sleep(0.002)
            with lock:
                ahead[0] -= 1
                behind[0] += 1
                most[1] = max(most[1], behind[0])
            yield item, lambda content=content: content

    def write(_: int, __: int) -> None:
        time.sleep(0.02)  # much slower, so that results wait
        with lock:
            behind[0] -= 1

    groups = (range(start, start + 5) for start in range(0, 40, 5))
    overlapped_groups(groups, read=read, work=work, write=write, flow=flow)
    assert ahead == behind == [0]
    allowed = max(AHEAD, min(flow.items, flow.bytes // weight + 1))
    # Besides what has been read, each thread reads; besides what waits, one is handed over.
    assert most[0] <= allowed + flow.threads + 1 and most[1] <= allowed + 1
    if weight == 1:
        assert most[1] > AHEAD


def test_items_of_a_group_that_cannot_be_used_are_named_and_the_others_are_done() -> None:
    done: list[int] = []

    def read(item: int) -> int:
        if item in (0, 4):
            raise DataError(f"item {item} is bad")
        return item

    def work(contents: Iterator[tuple[int, int]]) -> Iterator[tuple[int, Finish[int]]]:
        def finish(item: int) -> int:
            if item == 7:
                raise DataError("item 7 is no good")
            return item

        for item, _ in reversed(list(contents)):
            yield item, lambda item=item: finish(item)

    with refused(DataError, "3 file(s)", "item 0 is", "item 4 is", "item 7 is"):
        overlapped_groups(
            [range(5), range(5, 10)], read=read, work=work, write=lambda item, _: done.append(item)
        )
    assert sorted(done) == [1, 2, 3, 5, 6, 8, 9]
