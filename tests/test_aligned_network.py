"""Class weights in a network: folded into every architecture's classifier, recorded, and taken away again."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from darseg.data.prediction import FINE, Prediction
from darseg.errors import DataError, WeightsError
from darseg.model.aligned import AlignmentRecord, classifier_bias, fold_alignment, unfold_alignment
from darseg.model.fold import fold_batchnorm
from darseg.model.network import ARCHITECTURES, Network, NetworkSpec
from darseg.model.predict import predict, predict_scores
from darseg.model.together import Picture, Together
from darseg.model.weights import load_network, load_weights, read_alignment, read_spec, save_network
from darseg.model.windows import Protocol
from darseg.pseudo.align import align
from wording import refused

torch.set_num_threads(1)

K = 3
RECORD = AlignmentRecord(
    weights=(1.0, 4.75, 0.3),
    reachable=(False, True, True),
    target=(0.5, 0.3, 0.2),
    reached=(0.5, 0.31, 0.19),
    strength=0.5,
    bound=5.0,
    source="12 images",
)

SPECS = [
    *(
        NetworkSpec(name, "timm/resnet18" if name == "dpt" else "resnet18", K, 16, head_channels=8)
        for name in ARCHITECTURES
    ),
    NetworkSpec("deeplabv2", "resnet18", K, 16, auxiliary=False, release_classifier=True),
]


def build(spec: NetworkSpec, seed: int = 0) -> Network:
    """A network in eval mode whose biases are no round numbers."""
    torch.manual_seed(seed)
    network = spec.build()
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if key.endswith("bias"):
                value.copy_(torch.randn(value.shape))
    return network.eval()


def image(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (33, 49, 3), np.uint8)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.architecture}-{spec.release_classifier}")
def test_every_architecture_folds_weights_in_and_gives_them_back(spec: NetworkSpec, tmp_path: Path) -> None:
    if spec.backbone.startswith("timm/"):
        pytest.importorskip("timm")
    network = build(spec)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    height, width = network.sides.down(33), network.sides.down(49)
    pixels = torch.from_numpy(image()).permute(2, 0, 1)[None, :, :height, :width]
    with torch.no_grad():
        plain = network(pixels).main.double().softmax(dim=1)
        assert fold_alignment(network, RECORD) is network
        aligned = network(pixels).main.double().softmax(dim=1)
    weighted = plain * torch.tensor(RECORD.weights, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(aligned, weighted / weighted.sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-7)

    # Only that bias has changed; the auxiliary head is as it was.
    changed = [key for key, value in network.state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) == 1 and changed[0].startswith("head.") and changed[0].endswith("bias")

    # The file has the record, and gives the aligned or the plain network, whose file is the same as ever.
    save_network(network, tmp_path / "aligned.safetensors", spec)
    assert read_alignment(tmp_path / "aligned.safetensors") == network.alignment
    assert read_spec(tmp_path / "aligned.safetensors") == spec
    loaded = load_network(tmp_path / "aligned.safetensors")
    assert loaded.alignment == network.alignment
    assert torch.equal(classifier_bias(loaded), classifier_bias(network))
    save_network(build(spec), tmp_path / "plain.safetensors", spec)
    save_network(
        load_network(tmp_path / "aligned.safetensors", plain=True), tmp_path / "again.safetensors", spec
    )
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert read_alignment(tmp_path / "plain.safetensors") is None

    # Folding BatchNorm leaves the classifier alone: both work on what predicts.
    folded = fold_batchnorm(load_network(tmp_path / "aligned.safetensors"))
    assert folded.alignment == network.alignment
    unfold_alignment(folded)
    expected = fold_batchnorm(load_network(tmp_path / "plain.safetensors"))
    assert all(torch.equal(value, folded.state_dict()[key]) for key, value in expected.state_dict().items())

    unfold_alignment(network)
    assert network.alignment is None
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_two_foldings_multiply_and_one_step_takes_both_away() -> None:
    network = build(SPECS[0])
    plain = classifier_bias(network).clone()
    second = replace(RECORD, weights=(2.0, 0.25, 1.5), strength=1.0, source="3 other images")
    fold_alignment(fold_alignment(network, RECORD), second)
    assert network.alignment is not None
    assert network.alignment.weights == (2.0, 4.75 * 0.25, 0.3 * 1.5)
    assert network.alignment.source == "12 images; then 3 other images"
    assert network.alignment.strength == 1.0 and network.alignment.plain_bias == tuple(plain.tolist())

    # The same as folding the products in at once.
    at_once = fold_alignment(build(SPECS[0]), replace(RECORD, weights=network.alignment.weights))
    assert torch.equal(classifier_bias(network), classifier_bias(at_once))

    # A copy carries its own record.
    copied = copy.deepcopy(network)
    unfold_alignment(network)
    assert torch.equal(classifier_bias(network), plain)
    assert copied.alignment is not None and not torch.equal(classifier_bias(copied), plain)


def test_an_aligned_network_has_the_wanted_shares() -> None:
    network, protocol = build(SPECS[0]), Protocol((33, 49), mirror=False)
    scores = predict_scores(network, image(), protocol, average="logits").mean(0, 33)
    found = align(scores.flatten(1).T.numpy(), [0.2, 0.3, 0.5], bound=1e6)
    fold_alignment(network, AlignmentRecord.of(found, "one image"))
    assert network.alignment is not None and network.alignment.reached == tuple(found.reached)
    decided = predict_scores(network, image(), protocol, average="logits").mean(0, 33).argmax(dim=0)
    np.testing.assert_allclose(
        np.bincount(decided.flatten(), minlength=K) / decided.numel(), [0.2, 0.3, 0.5], atol=3e-3
    )


def test_training_goes_on_from_the_plain_network(tmp_path: Path) -> None:
    network = build(SPECS[0])
    plain = classifier_bias(network).clone()
    save_network(fold_alignment(network, RECORD), tmp_path / "aligned.safetensors", SPECS[0])
    other = build(SPECS[0], seed=1)
    report = load_weights(other, tmp_path / "aligned.safetensors")
    assert report.unaligned and other.alignment is None
    assert torch.equal(classifier_bias(other), plain)

    save_network(unfold_alignment(network), tmp_path / "plain.safetensors", SPECS[0])
    assert not load_weights(other, tmp_path / "plain.safetensors").unaligned


def test_records_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with refused(DataError, "2 class weights", "3 classes"):
        fold_alignment(
            build(SPECS[0]),
            AlignmentRecord((1, 1), (True, True), target=(0.5, 0.5), reached=(0.5, 0.5), strength=1, bound=5),
        )
    with refused(DataError, "reachable has 2 entries", "expected 3", "class 1: the weight is 0"):
        replace(RECORD, weights=(1, 0, 1), reachable=(True, True))
    with refused(DataError, "class 2: the weight is nan"):
        replace(RECORD, weights=(1, 1, float("nan")))
    with refused(DataError, "strength", "'abc'", "source", "3"):
        replace(RECORD, strength="abc", source=3)


def test_a_file_whose_weights_were_changed_after_aligning_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    network = fold_alignment(build(SPECS[0]), RECORD)
    with torch.no_grad():
        classifier_bias(network)[1] += 0.5
    save_network(network, path, SPECS[0])
    with refused(WeightsError, str(path), "class 1"):
        load_network(path)

    save_network(unfold_alignment(network), path, SPECS[0])
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["darseg"])
    for damaged in ({"weights": [1, 2, 3]}, RECORD.to_json() | {"weights": [1, 2]}, RECORD.to_json()):
        metadata = {"darseg": json.dumps(fields | {"alignment": damaged})}
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        with refused(WeightsError, str(path)):
            load_network(path)


def predict_variants(
    network: Network, protocol: Protocol, records: Sequence[AlignmentRecord | None]
) -> list[Prediction]:
    """The predictions of `image()` by each variant."""
    together = Together(network, protocol, average="probabilities", scale=FINE, records=records)
    ((_, finish),) = together.predict(iter([(0, Picture.of(image(), "image", together.device))]))
    return finish()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.architecture)
def test_variants_are_bit_for_bit_the_folded_networks(spec: NetworkSpec, bf16: bool) -> None:
    protocol = Protocol((33, 33), scales=(1.0, 1.5), bf16=bf16)
    network = build(spec)
    records = [None, RECORD, replace(RECORD, weights=(9.0, 0.2, 1.0)), None]
    found = predict_variants(network, protocol, records)
    expected = [predict(network, image(), protocol)]
    for record in (RECORD, replace(RECORD, weights=(9.0, 0.2, 1.0))):
        expected.append(predict(fold_alignment(build(spec), record), image(), protocol))
    expected.append(expected[0])
    assert len({prediction.codes.tobytes() for prediction in expected}) == 3
    for variant, folded in zip(found, expected, strict=True):
        np.testing.assert_array_equal(variant.classes, folded.classes)
        np.testing.assert_array_equal(variant.codes, folded.codes)

    # On an aligned network, too, None is the plain one; the network itself stays as it was.
    fold_alignment(network, RECORD)
    before = classifier_bias(network).clone()
    plain, aligned = predict_variants(network, protocol, [None, RECORD])
    np.testing.assert_array_equal(plain.codes, expected[0].codes)
    np.testing.assert_array_equal(aligned.codes, expected[1].codes)
    assert torch.equal(classifier_bias(network), before)
