"""How networks are scored: whole-image prediction against a slow version, scores against others' programs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from darseg.data.classes import CITYSCAPES
from darseg.data.encoding import label_encoding
from darseg.data.labels import read_label
from darseg.errors import DataError
from darseg.model.network import Network, build_network
from darseg.model.predict import predict, predict_scores
from darseg.model.windows import Protocol
from darseg.training.scores import Scores
from wording import refused, says

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # multi-scale testing of PSPNet


def decisive_network() -> Network:
    """A small network with logits far from each other, whatever the drawn weights."""
    torch.manual_seed(0)
    network = build_network(backbone="resnet18_half", classes=4, head_channels=8, output_stride=16).eval()
    for key, value in network.state_dict().items():
        if key.endswith("classifier.weight"):
            value.mul_(40)
    return network


@pytest.fixture(scope="module")
def network() -> Network:
    return decisive_network()


def slow(network: Network, image: np.ndarray, protocol: Protocol, average: str) -> torch.Tensor:
    """The release's protocol written out, one window at a time: float64 [K, H, W]."""
    height, width = image.shape[:2]
    total = torch.zeros(network.classes, height, width, dtype=torch.float64)
    for scale in protocol.scales:
        long_side = round(scale * (protocol.base_size or max(height, width)))
        if height >= width:
            size = long_side, round(long_side / height * width)
        else:
            size = round(long_side / width * height), long_side
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        if size != (height, width):
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        # The mean color on both sides.
        window_h, window_w = protocol.window
        pad_h, pad_w = max(0, window_h - size[0]), max(0, window_w - size[1])
        mean, std = network.mean[None, :, None, None], network.std[None, :, None, None]
        canvas = mean.expand(1, 3, size[0] + pad_h, size[1] + pad_w).clone()
        top, left = pad_h // 2, pad_w // 2
        canvas[:, :, top : top + size[0], left : left + size[1]] = x
        sums = torch.zeros(network.classes, *canvas.shape[2:], dtype=torch.float64)
        counts = torch.zeros(canvas.shape[2:], dtype=torch.float64)
        rows, columns = (
            sorted(
                {
                    min(i * math.ceil(w * 2 / 3), side - w)
                    for i in range(side)
                    if i * math.ceil(w * 2 / 3) < side
                }
            )
            for side, w in ((canvas.shape[2], window_h), (canvas.shape[3], window_w))
        )
        for row in rows:
            for column in columns:
                crop = (canvas[:, :, row : row + window_h, column : column + window_w] - mean) / std
                answers = [network(crop).main[0]]
                if protocol.mirror:
                    answers.append(network(crop.flip(3)).main[0].flip(2))
                for answer in answers:
                    part = answer.double()
                    if average == "probabilities":
                        part = part.softmax(0)
                    sums[:, row : row + window_h, column : column + window_w] += part
                    counts[row : row + window_h, column : column + window_w] += 1
        scores = (sums / counts)[:, top : top + size[0], left : left + size[1]]
        if size != (height, width):
            scores = F.interpolate(scores[None], size=(height, width), mode="bilinear", align_corners=False)[
                0
            ]
        total += scores / len(protocol.scales)
    return total


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize(
    "protocol",
    [
        Protocol((33, 33), mirror=False),
        Protocol((33, 49), base_size=120),
        Protocol((65, 65), base_size=40),
        Protocol((33, 33), base_size=64, scales=PAPER_SCALES),
    ],
    ids=["windows", "larger", "padded", "scales of the paper"],
)
@torch.inference_mode()
def test_whole_images_against_the_slow_version(network: Network, protocol: Protocol, average) -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 77, 3), np.uint8)
    wanted = slow(network, image, protocol, average)
    sums = predict_scores(network, image, protocol, average=average)
    mean = sums.mean(0, 50).double()
    assert mean.shape == wanted.shape == (4, 50, 77)
    assert (mean - wanted).abs().max() < 1e-4 * wanted.abs().max()
    if average == "probabilities":
        assert torch.allclose(mean.sum(0), torch.ones(50, 77, dtype=torch.float64), atol=1e-5)
        sure = wanted.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-4
        classes = torch.from_numpy(predict(network, image, protocol).classes.copy())
        assert sure.float().mean() > 0.9 and (classes == wanted.argmax(0))[sure].all()


def test_logits_and_probabilities_are_two_averages(network: Network) -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 77, 3), np.uint8)
    protocol = Protocol((33, 33))
    logits = predict_scores(network, image, protocol, average="logits").mean(0, 50).clone().softmax(0)
    probabilities = predict_scores(network, image, protocol, average="probabilities").mean(0, 50)
    assert (logits - probabilities).abs().max() > 1e-3


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.25)], ids=["own size", "two scales"])
@torch.inference_mode()
def test_whole_images_at_the_nearest_size(
    network: Network, scales: tuple[float, ...], mirror: bool, average
) -> None:
    """The release of UniMatch V2 written out: scale to the nearest size, predict, scale the logits back."""
    image = np.random.default_rng(1).integers(0, 256, (50, 73, 3), np.uint8)
    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() - network.mean[None, :, None, None]) / (
        network.std[None, :, None, None]
    )
    wanted = torch.zeros(4, 50, 73, dtype=torch.float64)
    # Sides are 16n + 1. 25 and 36.5, rounded, are nearest to 33 (of 17 and 33 the larger) and 33; 62.5 and 91 to 65, 97.
    for size in [(49, 81)] if len(scales) == 1 else [(33, 33), (65, 97)]:
        scaled = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        parts = [network(scaled).main, network(scaled.flip(3)).main.flip(3)][: 1 + mirror]
        for part in parts:
            back = F.interpolate(part, size=(50, 73), mode="bilinear", align_corners=True)[0].double()
            scores = back.softmax(0) if average == "probabilities" else back
            wanted += scores / len(parts) / len(scales)
    protocol = Protocol("whole", mirror=mirror, scales=scales)
    mean = predict_scores(network, image, protocol, average=average).mean(0, 50).double()
    assert mean.shape == wanted.shape
    assert (mean - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_one_number_stands_for_both_sides_of_a_window() -> None:
    assert Protocol(33) == Protocol((33, 33))  # ty: ignore[invalid-argument-type]


def test_protocols_that_are_not_possible() -> None:
    with refused(DataError, "(33, 0)"):
        Protocol((33, 0))
    with refused(DataError, "window all", "whole"):
        Protocol("all")  # ty: ignore[invalid-argument-type]
    for scales in ((), (0.0,)):
        with refused(DataError, f"scales {scales}"):
            Protocol((33, 33), scales=scales)


def test_a_protocol_in_words_names_all_that_moves_scores() -> None:
    says(Protocol((33, 49)).describe(), "own size", "33x49", "with mirror", "[1.0]", "probabilities", "fp32")
    unusual = Protocol((33, 33), base_size=120, mirror=False, scales=PAPER_SCALES, bf16=True)
    says(Protocol("whole").describe(), "own size", "whole images", "nearest", "with mirror")
    says(unusual.describe("logits"), "long side 120", "no mirror", "[0.5, 0.75, ", "logits", "bf16")


# --- scores


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 19), st.integers(1, 3))
def test_scores_are_those_of_cityscapes_scripts(
    tmp_path_factory, seed: int, present: int, images: int
) -> None:
    """On the same label maps: ids in the truth, ids in the predictions, as its evaluation server has them."""
    evaluation = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    from cityscapesscripts.helpers.labels import id2label, trainId2label

    folder, generator = tmp_path_factory.mktemp("scripts"), np.random.default_rng(seed)
    known = [k for k in id2label if k >= 0]
    some = generator.choice(19, present, replace=False)
    encoding, scores = label_encoding(CITYSCAPES), Scores.empty(19)
    truths, predictions = [], []
    for index in range(images):
        shape = tuple(generator.integers(1, 12, 2))
        truth = generator.choice([trainId2label[k].id for k in some] + known[:8], shape).astype(np.uint8)
        predicted = generator.choice(some, shape).astype(np.uint8)
        as_ids = np.array([trainId2label[k].id for k in range(19)], np.uint8)[predicted]
        for kind, values, paths in (("gtFine_labelIds", truth, truths), ("pred", as_ids, predictions)):
            paths.append(str(folder / f"a_{index}_{kind}.png"))
            Image.fromarray(values).save(paths[-1])
        scores = scores.plus(read_label(Path(truths[-1]), encoding), predicted)
    evaluation.args.quiet, evaluation.args.evalInstLevelScore, evaluation.args.JSONOutput = True, False, False
    theirs = evaluation.evaluateImgLists(predictions, truths, evaluation.args)
    for k, value in enumerate(scores.iou):
        assert value == pytest.approx(theirs["classScores"][trainId2label[k].name], nan_ok=True)
    assert scores.mean_iou == pytest.approx(theirs["averageScoreClasses"], nan_ok=True)


def voc_devkit(truths: list[np.ndarray], predictions: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """VOCevalseg of the development kit: classes 0..20, the border 255 left out; pixel by pixel."""
    counts = np.zeros((21, 21))
    for truth, predicted in zip(truths, predictions, strict=True):
        for true, guess in zip(truth.flat, predicted.flat, strict=True):
            if true < 255:
                counts[true, guess] += 1
    accuracies = np.full(21, np.nan)
    for j in range(21):
        union = counts[j].sum() + counts[:, j].sum() - counts[j, j]
        if union:
            accuracies[j] = counts[j, j] / union
    return accuracies, float(np.nanmean(accuracies))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 21))
def test_scores_are_those_of_the_voc_kit(seed: int, present: int) -> None:
    generator = np.random.default_rng(seed)
    some = generator.choice(21, present, replace=False)
    truths = [generator.choice([*some, 255], (6, 7)).astype(np.uint8) for _ in range(3)]
    truths[0][0, 0] = some[0]
    predictions = [generator.choice(some, (6, 7)).astype(np.uint8) for _ in truths]
    scores = Scores.empty(21)
    for truth, predicted in zip(truths, predictions, strict=True):
        scores = scores.plus(truth, predicted)
    iou, mean = voc_devkit(truths, predictions)
    assert np.allclose(scores.iou, iou, equal_nan=True) and scores.mean_iou == pytest.approx(mean)
