"""`darseg view`: the server's answers against the run's files, and the page in a real browser."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from starlette.testclient import TestClient

import darseg
import forks
from conftest import Visit, recipe_dict
from darseg.config.text import load_recipe
from darseg.errors import RunError
from darseg.run import browse
from darseg.run.browse import LabeledRound, open_round
from darseg.run.build import labeling_protocol
from darseg.run.directory import RunDirectory
from darseg.run.rounds import train
from darseg.view import app, connections, pictures, viewer
from darseg.view.table import Filter, Table
from wording import refused, says

torch.set_num_threads(1)

HOSTILE = [
    "u/07",
    'u/<img src=x onerror="window.hit=1">',
    "u/'\"><script>window.hit=1<!",
    "u/two words & 20% ü 🚗",
    "u/" + "very_long_" * 20,
    "u/12",
]
"""Ids of the unlabeled images."""
CLASSES = ["<script>window.hit=1<!", 'road & "way"', "ü 🚗", "x" * 120]
K = 11
HERE = {"host": "127.0.0.1:8765", "origin": "http://127.0.0.1:8765"}
TOKEN = "a-token"


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds on images and classes with hostile names; one image was marked before round 1."""
    root = tmp_path_factory.mktemp("view")
    data = root / "data"
    shutil.copytree(tiny_data, data)
    for old, new in zip((f"u/{index:02d}" for index in range(7, 13)), HOSTILE, strict=True):
        for kind in ("images", "labels"):
            os.rename(data / kind / f"{old}.png", root / "aside.png")
            os.rename(root / "aside.png", data / kind / f"{new}.png")
    (data / "labels" / "u" / "12.png").unlink()  # one without truth
    values = recipe_dict(data)
    values["data"] |= {
        "unlabeled": {"images": "images/u", "labels": "labels/u"},
        "classes": CLASSES + values["data"]["classes"][4:],
    }
    values["network"] |= {"backbone": "resnet18_half", "head_channels": 8}
    values["training"] |= {"workers": 1}
    values["rounds"] = [
        {"steps": 8},
        {"steps": 1, "labeling_ratio": 0.5},
        {"steps": 1, "labeling_ratio": 0.6},
    ]
    (root / "recipe.yaml").write_text(yaml.safe_dump(values))
    train(load_recipe(root / "recipe.yaml"), root / "run", console=Console(quiet=True))
    return root / "run"


IDS = [name.removeprefix("u/") for name in HOSTILE]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def client_of(run: Path, index: int | None = None) -> TestClient:
    """A client that sends the token."""
    application = app.viewer_app(open_round(run, index), TOKEN)
    return TestClient(application, base_url=HERE["origin"], headers={"authorization": f"token {TOKEN}"})


@pytest.fixture
def client(run: Path) -> Iterator[TestClient]:
    with client_of(run) as client:
        while (about := client.get("/api/run").json())["read"] < about["images"]:
            time.sleep(0.01)
        yield client


def label_of(run: Path, name: str, index: int = 2) -> np.ndarray:
    return cv2.imread(str(run / f"round_{index}" / "labels" / f"{name}.png"), cv2.IMREAD_UNCHANGED)


def names(client: TestClient, **query: object) -> list[str]:
    answer = client.get("/api/images", params={key.replace("_in", ""): str(v) for key, v in query.items()})
    assert answer.status_code == 200, answer.text
    return [image["id"] for image in answer.json()["images"]]


def png(content: bytes) -> tuple[np.ndarray, Image.Image]:
    image = Image.open(io.BytesIO(content))
    return np.array(image), image


# The answers of the server.


def test_the_list_agrees_with_the_label_maps(client: TestClient, run: Path) -> None:
    about = client.get("/api/run").json()
    assert (about["round"], about["images"], about["left_out"], about["truth"]) == (2, 6, 0, True)
    assert [entry["name"] for entry in about["classes"]][:4] == CLASSES
    answer = client.get("/api/images").json()
    assert answer["total"] == 6
    listed = {image["id"]: image for image in answer["images"]}
    noted = json.loads((run / "round_2" / "images.json").read_text())
    assert set(listed) == set(noted) == set(IDS)
    for name in IDS:
        label = label_of(run, name)
        assert listed[name]["coverage"] == pytest.approx(100 * (label != 255).mean(), abs=1e-3)
        detail = client.get(f"/api/images/{listed[name]['index']}").json()
        shares = [100 * (label == k).mean() for k in range(K)]
        assert detail["kept"] == pytest.approx(shares, abs=1e-3)
        predicted = noted[name]["predicted"]
        assert detail["predicted"] == pytest.approx(
            [100 * count / sum(predicted) for count in predicted], abs=1e-3
        )
        assert detail["truth"] is (name != "12")
    pages = [
        client.get("/api/images", params={"offset": at, "limit": 2}).json()["images"] for at in (0, 2, 4)
    ]
    assert [image["id"] for page in pages for image in page] == [image["id"] for image in answer["images"]]


def test_filters_and_orders_against_the_label_maps(client: TestClient, run: Path) -> None:
    listed = names(client)
    labels = {name: label_of(run, name) for name in listed}
    coverage = {name: 100 * (labels[name] != 255).mean() for name in listed}
    assert names(client, sort="coverage") == sorted(listed, key=lambda name: coverage[name])
    assert names(client, sort="coverage", down=1) == sorted(listed, key=lambda name: -coverage[name])
    assert names(client, sort="id") == sorted(listed)
    assert names(client, down=1) == listed[::-1]
    middle = sorted(coverage.values())[3]
    low = [name for name in listed if coverage[name] < middle - 1e-6]
    assert 0 < len(low) < 6
    assert names(client, coverage_to=middle - 1e-6) == low
    assert names(client, coverage_from=middle - 1e-6) == [name for name in listed if name not in low]
    for k in range(K):
        share = {name: 100 * (labels[name] == k).mean() for name in listed}
        assert names(client, class_in=k) == [name for name in listed if share[name] > 0]
        most = max(share.values())
        if most:
            assert names(client, class_in=k, share=most - 1e-9) == [n for n in listed if share[n] == most]
            wanted = sorted([n for n in listed if share[n] > 0], key=lambda name: -share[name])
            assert names(client, class_in=k, sort="share", down=1) == wanted
    assert names(client, text="<SCRIPT>") == [name for name in listed if "<script>" in name]
    assert names(client, confidence_from=0.5) == []  # unknown values pass no bound
    answer = client.get("/api/images", params={"find": listed[4], "limit": 0, "down": 1}).json()
    assert answer["place"] == 1 and answer["images"] == []


def test_names_are_found_however_their_accents_are_written(client: TestClient) -> None:
    wanted = [name for name in IDS if "ü" in name]
    assert wanted
    for text in ("ü", "u\u0308", "Ü", "U\u0308"):
        assert names(client, text=text) == wanted


def test_facts_that_a_round_stored_are_used(run: Path) -> None:
    """Label maps are not read for them."""
    rng = np.random.default_rng(5)
    facts = {
        name: {
            "confidence": float(rng.random()),
            "predicted": rng.integers(1, 500, K).tolist(),
            "kept": rng.integers(0, 2, K).tolist(),
        }
        for name in IDS
    }
    (run / "round_2" / "images.json").write_text(json.dumps(facts))
    shutil.rmtree(run / "round_2" / "labels")
    with client_of(run) as client:
        while (about := client.get("/api/run").json())["read"] < 6:
            time.sleep(0.01)
        assert about["confidence"] and about["predicted"]
        sure = {name: image["confidence"] for name, image in facts.items()}
        assert names(client, sort="confidence", down=1) == sorted(IDS, key=lambda name: -sure[name])
        middle = sorted(sure.values())[3]
        assert set(names(client, confidence_from=middle - 1e-9)) == {n for n in IDS if sure[n] >= middle}
        share = {n: 100 * fact["predicted"][3] / sum(fact["predicted"]) for n, fact in facts.items()}
        bound = sorted(share.values())[2]
        wanted = {name for name in IDS if share[name] >= bound}
        assert set(names(client, class_in=3, share=bound - 1e-9, of="prediction")) == wanted


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"07": {"kept": [1]}}', '{"07": {"kept": [1], "predicted": [2], "confidence": 0.5}}']
)
def test_damaged_facts_are_reported(run: Path, text: str) -> None:
    (run / "round_2" / "images.json").write_text(text)
    with pytest.raises(RunError) as caught:
        open_round(run)
    assert str(run / "round_2" / "images.json") in str(caught.value)


def test_pictures_agree_with_the_files(client: TestClient, run: Path) -> None:
    round_ = open_round(run)
    palette = round_.classes.palette()
    for index, sample in enumerate(round_.samples[:2]):
        label = label_of(run, sample.id)
        values, image = png(client.get(f"/images/{index}/label").content)
        assert image.mode == "P" and np.array_equal(values, label)
        colored = np.array(image.convert("RGBA"))
        assert np.array_equal(colored[:, :, 3], np.where(label == 255, 0, 255))
        assert np.array_equal(colored[label != 255][:, :3], palette[label[label != 255]])
        photo, image = png(client.get(f"/images/{index}/photo").content)
        truth = darseg.read_image(sample.image)
        assert image.format == "JPEG" and photo.shape == truth.shape
        assert np.abs(photo.astype(int) - truth).mean() < 6
        network = darseg.load_network(RunDirectory(run).network(1))
        wanted = darseg.predict_for_labeling(network, truth, labeling_protocol(round_.recipe))
        values, _ = png(client.get(f"/images/{index}/prediction").content)
        assert np.mean(values == wanted.classes) > 0.999  # the memory format can change last bits
        values, image = png(client.get(f"/images/{index}/confidence").content)
        assert np.abs(values / 255 - wanted.confidence).max() < 0.01
        assert len(np.unique(np.array(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20
        values, _ = png(client.get(f"/images/{index}/truth").content)
        assert np.array_equal(values, darseg.read_label(sample.label))
        small, _ = png(client.get(f"/images/{index}/photo?small=1").content)
        assert max(small.shape[:2]) == min(app.THUMBNAIL, max(truth.shape[:2]))
        pixel = client.get(f"/api/images/{index}/pixel?x=0.5&y=0.25").json()
        y, x = int(0.25 * label.shape[0]), int(0.5 * label.shape[1])
        assert (pixel["x"], pixel["y"]) == (x, y)
        assert pixel["label"] == (None if label[y, x] == 255 else label[y, x])
        assert pixel["prediction"] == wanted.classes[y, x]
        assert pixel["confidence"] == pytest.approx(wanted.confidence[y, x], abs=0.002)
    without = [sample.id for sample in round_.samples].index("12")
    answer = client.get(f"/images/{without}/truth")
    assert answer.status_code == 404
    says(answer.text, "truth")


def test_images_that_the_run_did_not_begin_with_are_not_shown(run: Path, tmp_path: Path, monkeypatch) -> None:
    """A run folder of somebody else may name any folder of this machine as its data."""
    root = Path(load_recipe(run / "recipe.yaml").data.root)
    private = tmp_path / "private"
    shutil.copytree(root, private)
    image = open_round(run).samples[0].image
    with open(private / image.relative_to(root), "ab") as file:
        file.write(b"one byte more")
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(root), str(private)))
    with client_of(run) as client:
        for kind in ("photo", "truth", "prediction", "confidence"):
            answer = client.get(f"/images/1/{kind}")
            assert answer.status_code == 403
        says(answer.text, str(private), "unlabeled", "darseg view --pictures")
        assert client.get("/images/1/label").status_code == 200
        assert "truth" not in client.get("/api/images/1/pixel?x=0.5&y=0.5").json()
    said: list[str] = []
    monkeypatch.setattr(viewer._Server, "run", lambda self, sockets: None)
    viewer.view_run(run, port=0, say=said.append)
    assert said[1] == f"warning: {answer.text}" and len(said) == 3
    says(said[0], str(run), str(private), "11 images and label maps")
    viewer.view_run(run, port=0, pictures=True, say=said.append)
    assert len(said) == 5


def test_control_characters_and_overrides_of_direction_in_names_are_escapes(run: Path) -> None:
    table = Table(open_round(run))
    table.ids[0] = "a\u202egnp\x1b[2J"
    row = table.row(0, {}, Filter())
    assert row["name"] == "a\\u202egnp\\x1b[2J" and row["id"] == table.ids[0]


def test_large_pictures_are_scaled_and_stay_aligned() -> None:
    values = np.repeat(np.repeat(np.arange(20, dtype=np.uint8).reshape(4, 5), 100, 0), 100, 1)
    palette = np.arange(768).reshape(256, 3).astype(np.uint8)
    small, _ = png(pictures.indexed_png(values, 50, palette=palette, transparent=255))
    assert np.array_equal(small, values[5::10, 5::10])
    photo, _ = png(pictures.jpeg(np.dstack([values] * 3), 50, 90))
    assert photo.shape == (40, 50, 3)


def test_predictions_that_were_kept_are_not_made_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = open_round(run).samples[0]
    height, width = label_of(run, sample.id).shape
    kept = darseg.Prediction(
        np.full((height, width), 3, np.uint8), np.full((height, width), 15000, np.uint16)
    )
    path = run / "round_2" / "predictions" / f"{sample.id}.prediction"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(kept.to_bytes())
    monkeypatch.setattr(browse, "load_labeler", lambda *what, **how: pytest.fail("predicted"))
    with client_of(run) as client:
        values, _ = png(client.get("/images/0/prediction").content)
        assert (values == 3).all()


def test_the_last_predictions_stay_in_memory_and_no_more(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted: list[str] = []
    again = browse.Repredictor(open_round(run))
    monkeypatch.setattr(browse, "REMEMBERED", 2)

    def predict(sample: Any) -> darseg.Prediction:
        predicted.append(sample.id)
        return darseg.Prediction(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint16))

    monkeypatch.setattr(again, "_predict", predict)
    a, b, c = again.round.samples[:3]
    for sample in (a, b, a, c, a, b):
        again.prediction(sample)
    assert predicted == [a.id, b.id, c.id, b.id]
    assert again.known(c) is None and again.known(a) is not None


def test_abandoned_requests_are_not_predicted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stepping fast: during one prediction, others are requested and abandoned. These are skipped."""
    begun, go_on, predicted = threading.Event(), threading.Event(), []

    def predict(self: Any, sample: Any) -> darseg.Prediction:
        predicted.append(sample.id)
        begun.set()
        assert go_on.wait(60)
        return darseg.Prediction(np.zeros((65, 97), np.uint8), np.zeros((65, 97), np.uint16))

    monkeypatch.setattr(browse.Repredictor, "_predict", predict)
    round_ = open_round(run)
    with serving(round_) as port:

        def asking(index: int) -> socket.socket:
            sock = socket.create_connection(("127.0.0.1", port))
            head = f"GET /images/{index}/prediction?token={TOKEN} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            head += "Connection: close\r\n\r\n"
            sock.sendall(head.encode())
            return sock

        first = asking(0)
        assert begun.wait(60)
        abandoned = [asking(1), asking(2)]
        time.sleep(0.3)
        for sock in abandoned:
            sock.close()
        last = asking(3)
        time.sleep(0.3)
        go_on.set()
        for sock in (first, last):
            answer = b"".join(iter(partial(sock.recv, 65536), b""))
            assert answer.startswith(b"HTTP/1.1 200 ")
            sock.close()
    assert predicted == [round_.samples[0].id, round_.samples[3].id]


def test_earlier_rounds_and_left_out_images(run: Path) -> None:
    darseg.mark_bad(run, ["07"])
    shutil.rmtree(run / "round_2")
    train(load_recipe(run / "recipe.yaml"), run, console=Console(quiet=True))
    with client_of(run, 1) as client:
        about = client.get("/api/run").json()
        assert (about["round"], about["left_out"], about["marked"]) == (1, 0, 1)
    with client_of(run) as client:
        assert client.get("/api/run").json()["left_out"] == 1
        row = next(image for image in client.get("/api/images").json()["images"] if image["id"] == "07")
        assert row["left_out"] and row["bad"] and row["coverage"] is None
        answer = client.get(f"/images/{row['index']}/label")
        assert answer.status_code == 404
        says(answer.text, "Round 2", "bad")
        assert client.get(f"/images/{row['index']}/photo").status_code == 200


def test_an_unreadable_file_is_reported_and_hides_no_other(run: Path) -> None:
    name = open_round(run).samples[1].id
    (run / "round_2" / "labels" / f"{name}.png").write_bytes(b"\x89PNG torn")
    (run / "round_2" / "images.json").unlink()  # otherwise its facts are taken from there
    with client_of(run) as client:
        while (about := client.get("/api/run").json())["read"] < about["images"]:
            time.sleep(0.01)
        rows = client.get("/api/images").json()["images"]
        assert [image["unreadable"] for image in rows] == [False, True, False, False, False, False]
        answer = client.get("/images/1/label")
        assert answer.status_code == 500 and f"{name}.png" in answer.text
        assert client.get("/images/0/label").status_code == 200


# Marks.


def test_marks_are_stored_in_the_run_folder(client: TestClient, run: Path) -> None:
    def mark(index: object, bad: object) -> Any:
        return client.post("/api/marks", json={"index": index, "bad": bad}, headers=HERE)

    listed = names(client)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert mark(4, True).json() == {"index": 4, "bad": True, "marked": 1}
    assert mark(1, True).json()["marked"] == 2
    assert names(client, marked=1) == [listed[1], listed[4]]
    assert mark(4, False).json() == {"index": 4, "bad": False, "marked": 1}
    assert [entry["id"] for entry in json.loads((run / "bad_images.json").read_text())] == [listed[1]]
    assert {p: p.read_bytes() for p in before} == before  # nothing else was touched
    with client_of(run) as another:
        assert names(another, marked=1) == [listed[1]]
    for index, bad in ((6, True), (-1, True), ("0", True), (0, 1), (True, True), (None, None)):
        answer = mark(index, bad)
        assert answer.status_code == 400
    says(answer.text, '"index": 0 to 5', '"bad"')
    assert client.post("/api/marks", content="{", headers=HERE).status_code == 400
    assert client.post("/api/marks", content=" " * 20_000, headers=HERE).status_code == 413
    assert names(client, marked=1) == [listed[1]]


def test_a_mark_that_cannot_be_written_is_reported(
    client: TestClient, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    answer = client.post("/api/marks", json={"index": 0, "bad": True}, headers=HERE)
    assert answer.status_code == 500 and "bad_images.json" in answer.text and "full" in answer.text
    assert not (run / "bad_images.json").exists()


# Who may send requests, and for what.


@pytest.mark.parametrize(
    "path",
    [
        "/../recipe.yaml",
        "/%2e%2e/recipe.yaml",
        "/images/..%2f..%2frecipe.yaml/photo",
        "/images/0/../../recipe.yaml",
        "/images/0/..%2f..%2fjournal.jsonl",
        "/images/0/%2Fetc%2Fpasswd",
        "/images//etc/passwd/photo",
        "/images/-1/photo",
        "/images/6/photo",
        "/images/99999999999999999999/photo",
        "/images/0/recipe",
        "/viewer.py",
        "/recipe.yaml",
        "/api/images/6",
        "//etc/passwd",
    ],
)
def test_only_images_of_the_run_can_be_requested(run: Path, path: str) -> None:
    """As raw bytes on a real socket, because a client library would normalize the path."""
    with serving(open_round(run)) as port, socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(
            f"GET {path}?token={TOKEN} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"root:" not in answer and b"seed:" not in answer


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:8765", True),
        ("localhost:9000", True),
        ("localhost", True),
        ("evil.example", False),
        ("evil.example:8765", False),
        ("127.0.0.1.evil.example", False),
        ("localhost:80@evil.example", False),
        ("127.0.0.1:", True),
        ("[::1]:8765", False),
        ("", False),
    ],
)
def test_requests_under_other_host_names_are_refused(client: TestClient, host: str, allowed: bool) -> None:
    for path in ("/", "/api/run", "/images/0/photo"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == (200 if allowed else 403), path


def test_refused_requests_are_explained(client: TestClient) -> None:
    says(client.get("/", headers={"host": "evil.example"}).text, "http://127.0.0.1", "http://localhost")
    says(client.post("/api/marks", json={"index": 0, "bad": True}).text, "own page")
    says(client.post("/api/marks", content=" " * 20_000, headers=HERE).text, "10000")


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:1", "https://127.0.0.1:8765"]
)
def test_other_pages_cannot_mark(client: TestClient, run: Path, origin: str | None) -> None:
    headers = {"host": HERE["host"]} | ({} if origin is None else {"origin": origin})
    answer = client.post("/api/marks", json={"index": 0, "bad": True}, headers=headers)
    assert answer.status_code == 403
    assert not (run / "bad_images.json").exists()


def test_every_answer_forbids_the_browser_what_the_page_does_not_need(client: TestClient) -> None:
    for path in (
        "/",
        "/viewer.js",
        "/viewer.css",
        "/api/run",
        "/images/0/photo",
        "/nothing",
        "/images/7/photo",
    ):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        kept = "private, max-age=86400" if path == "/images/0/photo" else ("no-cache", "no-store")
        assert headers["cache-control"] in kept
    assert client.post("/", headers=HERE).status_code == 405
    tokens = {client.get("/api/run").json()["token"] for _ in range(2)}
    assert len(tokens) == 1


@pytest.mark.parametrize(
    ("query", "facts"),
    [
        ("class=x", ["class x", "0 to 10"]),
        ("class=11", ["class 11", "0 to 10"]),
        ("class=-1", ["class -1", "0 to 10"]),
        ("share=nan", ["nan"]),
        ("coverage_from=x", ["x"]),
        ("sort=size", ["sort", "size", "coverage"]),
        ("of=truth", ["of", "truth", "prediction"]),
        ("offset=-1", ["offset", "-1"]),
        ("limit=201", ["limit", "201", "200"]),
    ],
)
def test_filters_that_make_no_sense_are_refused(client: TestClient, query: str, facts: list[str]) -> None:
    answer = client.get(f"/api/images?{query}")
    assert answer.status_code == 400
    says(answer.text, *facts)


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        ("/images/6/photo", ["image 6", "0 to 5"]),
        ("/images/0/recipe", ["photo, label, prediction, confidence, result, truth"]),
        ("/api/images/0/pixel?x=0.5&y=", ["x and y"]),
    ],
)
def test_requests_for_what_does_not_exist_are_explained(
    client: TestClient, path: str, facts: list[str]
) -> None:
    answer = client.get(path)
    assert answer.status_code in (400, 404)
    says(answer.text, *facts)


def test_requests_without_the_token_are_refused(client: TestClient, run: Path) -> None:
    """Every user of the machine reaches the server, so that it listens at 127.0.0.1 is not enough."""
    del client.headers["authorization"]
    for path in ("/", "/viewer.js", "/viewer.css", "/api/run", "/api/images", "/images/0/photo", "/nothing"):
        for query in (
            "",
            "?token=",
            "?token=b-token",
            f"?token={TOKEN}x",
            "?token=%C3%BC",
            "?other=" + TOKEN,
        ):
            answer = client.get(path + query)
            assert answer.status_code == 403, (path, query)
            assert client.get(path, headers={"authorization": f"Basic {TOKEN}"}).status_code == 403
        assert client.get(f"{path}?token={TOKEN}").status_code == (404 if path == "/nothing" else 200)
    says(answer.text, "token", "darseg view")
    assert client.post("/api/marks", json={"index": 0, "bad": True}, headers=HERE).status_code == 403
    assert not (run / "bad_images.json").exists()


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_request_nothing_but_links_to_the_page_work(client: TestClient, site: str) -> None:
    """The servers of other users at other ports of 127.0.0.1 are of the same site."""
    link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/", headers=link | {"sec-fetch-dest": "iframe"}).status_code == 403
    for path in ("/api/run", "/images/0/photo", "/viewer.js"):
        answer = client.get(path, headers=link)
        assert answer.status_code == 403
        assert client.get(path, headers={"sec-fetch-site": "same-origin"}).status_code == 200
    says(answer.text, "own page")
    assert client.post("/api/marks", json={"index": 0, "bad": True}, headers=HERE | link).status_code == 403


def test_the_browser_is_started_with_a_page_that_only_the_user_can_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All users of a machine can list the arguments of processes, so the browser's hold no secret."""
    opened: list[str] = []
    pages: list[str] = []

    def start(address: str) -> None:
        page = Path(address.removeprefix("file://"))
        assert (page.stat().st_mode & 0o777, page.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        opened.append(address)
        pages.append(page.read_text())

    monkeypatch.setattr(viewer.webbrowser, "open", start)
    monkeypatch.setattr(viewer._Server, "run", lambda self, sockets: None)
    said: list[str] = []
    viewer.view_run(run, port=0, open_browser=True, say=said.append)
    printed = next(word for word in said[-1].split() if word.startswith("http://"))
    assert f"url={printed}" in pages[0] and len(printed.split("token=")[1]) >= 32
    assert opened[0].startswith("file:///") and "token" not in opened[0]
    assert not Path(opened[0].removeprefix("file://")).parent.exists()  # it is removed at the end


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/images/0/pixel?x=1e308&y=-1e308", 200),
        ("/api/images/0/pixel?x=1e999&y=0", 400),
        ("/api/images/" + "9" * 4400, 404),
        ("/images/²/photo", 404),
        ("/api/images?class=" + "9" * 4400, 400),
        ("/api/images?offset=" + "9" * 4400, 400),
        ("/api/images?offset=" + "9" * 30, 200),
    ],
)
def test_numbers_of_any_size_are_answered(client: TestClient, path: str, code: int) -> None:
    assert client.get(path).status_code == code


def test_marks_that_are_nested_deeply_are_refused(client: TestClient) -> None:
    assert client.post("/api/marks", content="[" * 9000, headers=HERE).status_code == 400


def test_a_fault_of_the_viewer_is_one_line(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "read_image", lambda *_: 1 // 0)
    client = TestClient(client.app, HERE["origin"], headers=client.headers, raise_server_exceptions=False)
    answer = client.get("/images/0/photo")
    assert answer.status_code == 500
    says(answer.text, "ZeroDivisionError")
    assert "\n" not in answer.text
    (record,) = [record for record in caplog.records if record.name == "uvicorn.error"]
    assert record.exc_info is None and "\n" not in record.getMessage()
    assert "GET /images/0/photo" in record.getMessage()


def test_connections_without_a_request_are_closed_and_limited(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a request holds a connection for so long at most, even if more of it arrives now and then."""
    monkeypatch.setattr(connections, "PATIENCE", 1.0)
    monkeypatch.setattr(connections, "MOST", 4)
    with serving(open_round(run)) as port:
        head = f"GET /api/run?token={TOKEN} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n".encode()

        def connect() -> socket.socket:
            sock = socket.create_connection(("127.0.0.1", port), timeout=10)
            sock.sendall(head)
            return sock

        slow = [connect() for _ in range(12)]
        whole = connect()
        whole.sendall(b"Connection: close\r\n\r\n")
        assert b"".join(iter(lambda: whole.recv(65536), b"")).startswith(b"HTTP/1.1 200 ")
        whole.close()
        began = time.monotonic()
        while time.monotonic() - began < 0.8:
            with contextlib.suppress(OSError):
                slow[-1].sendall(b"X-a: b\r\n")
            time.sleep(0.1)
        for sock in slow:
            sock.settimeout(30)
            with contextlib.suppress(ConnectionError):
                assert sock.recv(65536) == b""
            sock.close()
        assert time.monotonic() - began < 30
        again = connect()
        again.sendall(b"\r\n")
        assert again.recv(65536).startswith(b"HTTP/1.1 200 ")
        again.close()


# The command.


class serving:
    """Runs the server on a thread, at a free port."""

    def __init__(self, round_: LabeledRound) -> None:
        self.sock, self.server = viewer.listen(0), viewer.server_of(round_, TOKEN)
        self.thread = threading.Thread(target=self.server.run, args=([self.sock],))

    def __enter__(self) -> int:
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.sock.getsockname()[1]

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.sock.close()


def test_a_port_in_use_is_refused() -> None:
    with viewer.listen(0) as taken:
        assert taken.getsockname()[0] == "127.0.0.1"
        port = taken.getsockname()[1]
        vary = [str(port), r"(?<=\()[A-Z].*(?=\))"]
        with refused(RunError, f"Port {port}", "127.0.0.1", "--port", vary=vary):
            viewer.listen(port)


def test_the_next_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with viewer.listen(0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(viewer, "PORT", port)
        with viewer.listen(None) as listener:
            assert port < listener.getsockname()[1] < port + viewer.PORTS_TRIED
        monkeypatch.setattr(viewer, "PORTS_TRIED", 1)
        with refused(RunError, f"{port} to {port}", "--port 0", vary=[str(port)]):
            viewer.listen(None)


def test_runs_that_cannot_be_viewed_are_refused(
    run: Path, tmp_path: Path, call: Callable[..., tuple[Any, str, str]]
) -> None:
    code, _, err = call("view", tmp_path / "nowhere")
    assert code == 2 and "recipe.yaml" in err
    code, _, err = call("view", run, "--round", 3)
    assert code == 2
    says(err, str(run), "round 3", "1, 2", "darseg train")
    (run / "bad_images.json").write_text('[{"id": "x", "time": 1}]')
    code, _, err = call("view", run)
    assert code == 2 and "'x'" in err
    for index in (1, 2):
        shutil.rmtree(run / f"round_{index}")
    code, _, err = call("view", run)
    assert code == 2
    says(err, str(run), "darseg train")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["rounds"] = recipe["rounds"][:1]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = call("view", run)
    assert code == 2
    says(err, str(run), "round 0", "recipe")


@pytest.mark.parametrize("after", [0.0, 1.0])
def test_ctrl_c_ends_it_quietly(run: Path, after: float) -> None:
    command = [sys.executable, "-m", "darseg", "view", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = [process.stdout.readline() for _ in range(2)][1] if process.stdout else ""
    if not after:
        says(
            line,
            "6 unlabeled images",
            "round 2",
            "http://127.0.0.1:",
            vary=[r"(?<=127\.0\.0\.1:)\d+", r"(?<=token=)\S+"],
        )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


BEFORE_IT_RUNS = """
import signal, sys
from darseg.view import viewer

def interrupt(*_):
    signal.raise_signal(signal.SIGINT)

def listen(port):
    interrupt()
    return sock

run, moment = sys.argv[1:]
sock = viewer.listen(0)
if moment == "listen":
    viewer.listen = listen
viewer.view_run(run, port=0, say=interrupt if moment == "say" else print)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.parametrize("moment", ["say", "listen"])
def test_ctrl_c_before_the_server_runs_ends_it_too(run: Path, moment: str) -> None:
    """In a process of its own, because the event loop of the browser's driver may already run in this one."""
    result = forks.python("-c", BEFORE_IT_RUNS, run, moment)
    assert (result.returncode, result.stderr) == (0, "")


# The page.


@pytest.fixture
def page(run: Path, visit: Callable[..., Visit]) -> Iterator[Callable[..., Visit]]:
    """Opens the page: page(hash, width=…)."""
    with serving(open_round(run)) as port:

        def open_page(hash: str = "", **options: Any) -> Visit:
            visited = visit(f"http://127.0.0.1:{port}/?token={TOKEN}{hash}", **options)
            visited.page.wait_for_selector(".item[aria-selected=true]", state="attached")
            visited.page.wait_for_selector("#legend button")
            return visited

        yield open_page


def wait_for(visited: Visit, *kinds: str) -> None:
    """Wait until the panes of these kinds show their pictures."""
    for kind in kinds:
        picture = visited.page.locator(f'.sheet img[alt="{kind}"][src]')
        picture.wait_for()
        assert picture.evaluate("image => image.naturalWidth") == 97


def fine(visited: Visit) -> None:
    """Nothing failed, nothing left the machine, and no name was run as a script."""
    assert visited.errors == [] and visited.leaving_the_machine() == []
    assert visited.page.evaluate("window.hit") is None


def test_the_page_shows_an_image_in_all_its_panes(page: Callable[..., Visit], run: Path) -> None:
    visited = page()
    wait_for(visited, "Photograph", "Pseudo label", "Prediction", "Confidence")
    for position, sample in enumerate(open_round(run).samples):
        assert visited.page.locator(f"#row-{position} bdi").text_content() == sample.id
    chips = visited.page.locator("#legend button > span").all_text_contents()
    assert chips[:4] == CLASSES
    visited.page.wait_for_selector(".item img")
    box = visited.page.locator(".frame").first.bounding_box()
    visited.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    visited.page.locator("#pixel b").nth(3).wait_for()
    assert visited.page.locator("#pixel").text_content().startswith("x 48, y 32 · pseudo label ")
    assert visited.page.locator(".cross:visible").count() == 4
    visited.page.mouse.wheel(0, -600)
    assert "scale" not in (visited.page.locator(".sheet").first.get_attribute("style") or "")
    width = visited.page.locator(".sheet").first.bounding_box()["width"]
    assert width > 2 * box["width"]
    visited.page.keyboard.press("0")
    assert visited.page.locator(".sheet").first.bounding_box()["width"] <= box["width"]
    fine(visited)


def test_keys_step_mark_and_switch(page: Callable[..., Visit], run: Path) -> None:
    visited = page("#overlay=label&opacity=40")
    press, text = visited.page.keyboard.press, visited.page.locator
    ids = [sample.id for sample in open_round(run).samples]

    def shows(number: int) -> None:
        visited.page.wait_for_selector(f"#row-{number}[aria-selected=true]")
        assert text("#id").text_content() == ids[number]

    for key, number in (
        ("j", 1),
        ("ArrowRight", 2),
        ("k", 1),
        ("ArrowLeft", 0),
        ("End", 5),
        ("j", 5),
        ("Home", 0),
    ):
        press(key)
        shows(number)
    press("j")
    shows(1)
    press("b")
    text("#bad[aria-pressed=true]").wait_for()
    assert [entry["id"] for entry in json.loads((run / "bad_images.json").read_text())] == [ids[1]]
    assert text("#row-1 .tag").text_content() == "bad" and "1 marked" in text("#count").text_content()
    for pane, kind in (("1", "Photograph"), ("4", "Confidence"), ("5", "Truth")):
        figure = text(f'.sheet img[alt="{kind}"]').locator("xpath=ancestor::figure")
        before = figure.is_visible()
        press(pane)
        assert figure.is_visible() is not before
        press(pane)
        assert figure.is_visible() is before
    over = text('.frame img[alt=""][src]').first
    over.wait_for()
    assert over.evaluate("image => image.style.opacity") == "0.4"
    press("]")
    assert over.evaluate("image => image.style.opacity") == "0.5"
    press("o")
    text('.sheet img[alt=""][src]').wait_for(state="detached")
    press("o")
    text('.sheet img[alt=""][src]').wait_for()
    press("?")
    text("#help[open]").wait_for()
    press("j")
    press("Escape")
    shows(1)
    # Letters typed into a field are text.
    press("/")
    visited.page.keyboard.type("bjo1?")
    assert text("#text").input_value() == "bjo1?"
    text("#count", has_text="No image passes this filter").wait_for()
    press("Escape")
    press("b")
    text("#bad[aria-pressed=false]").wait_for()
    assert json.loads((run / "bad_images.json").read_text()) == []
    fine(visited)


def test_filters_and_the_address_that_keeps_them(
    page: Callable[..., Visit], run: Path, visit: Callable[..., Visit]
) -> None:
    labels = {sample.id: label_of(run, sample.id) for sample in open_round(run).samples}
    k = next(k for k in range(K) if 0 < sum((label == k).any() for label in labels.values()) < 6)
    wanted = [name for name, label in labels.items() if (label == k).any()]
    visited = page()
    visited.page.select_option("#class", str(k))
    visited.page.locator("#count", has_text=f"{len(wanted)} of 6 images").wait_for()
    for position, name in enumerate(wanted):
        visited.page.locator(f"#row-{position} bdi", has_text=name).wait_for()
    assert visited.page.locator(".item").count() == len(wanted)
    visited.page.keyboard.press("End")
    visited.page.wait_for_selector(f"#row-{len(wanted) - 1}[aria-selected=true]")
    visited.page.keyboard.press("3")
    again = visit(visited.page.url)
    again.page.wait_for_selector(f"#row-{len(wanted) - 1}[aria-selected=true]")
    assert again.page.locator("#id").text_content() == wanted[-1]
    assert again.page.locator("#class").input_value() == str(k)
    assert again.page.locator("figure:visible").count() == 3
    again.page.click("#reset")
    again.page.locator("#count", has_text="6 images").wait_for()
    assert again.page.locator("#id").text_content() == wanted[-1]  # stays in view
    again.page.check("#marked")
    again.page.locator("#count", has_text="No image passes this filter").wait_for()
    fine(visited)
    fine(again)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_both_schemes(page: Callable[..., Visit], scheme: str) -> None:
    visited = page(width=390, height=844, color_scheme=scheme)
    wait_for(visited, "Photograph", "Prediction")
    ground = visited.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) is (scheme == "dark")
    assert visited.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not visited.page.locator("#side").is_visible()
    visited.page.click("#open-list")
    visited.page.locator(".item").nth(4).click()
    visited.page.wait_for_selector("#row-4[aria-selected=true]", state="attached")
    assert not visited.page.locator("#side").is_visible()
    assert visited.page.evaluate("document.documentElement.scrollWidth") <= 390
    tops = [figure.bounding_box()["y"] for figure in visited.page.locator("figure:visible").all()]
    assert tops == sorted(tops) and len(set(tops)) == 4
    fine(visited)


def test_many_images_need_no_long_page(run: Path, visit: Callable[..., Visit]) -> None:
    """Of 5,000 entries the list draws only those in view, and the last is reached at once."""
    round_ = open_round(run)
    many = tuple(replace(round_.samples[at % 6], id=f"{at:05d}") for at in range(5000))
    excluded = frozenset(sample.id for sample in many)
    with serving(replace(round_, samples=many, excluded=excluded)) as port:
        visited = visit(f"http://127.0.0.1:{port}/?token={TOKEN}")
        visited.page.wait_for_selector("#row-0[aria-selected=true]")
        visited.page.keyboard.press("End")
        visited.page.wait_for_selector("#row-4999[aria-selected=true]")
        assert visited.page.locator("#id").text_content() == "04999"
        assert visited.page.locator(".item").count() < 40
        assert "left this image out" in visited.page.locator(".note:visible").first.text_content()
        fine(visited)
