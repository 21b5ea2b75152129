"""Shared by the tests: a tiny drawn data set in the layout users have, and a recipe for it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import settings

import forks
from darseg.cli import main
from darseg.demo.scenes import SCENE_CLASSES, draw_scene

REPOSITORY = Path(__file__).parents[1]
SIZE = (65, 97)  # height, width of the tiny images


os.fsync = lambda descriptor: None  # slow, and a test loses nothing that the system has buffered

LONGEST = (
    "unkillable",
    "methods",
    "machines",
    "processes",
    "paper_runs",
    "export",
    "exclusion",
    "result",
    "cli",
    "online_runs",
    "labelers",
    "gpu_script",
    "benchmarks",
    "view",
    "convert",
    "run",
)
"""Files of tests, the longest first: they start first, or one process would work on them alone at the end."""


FULL = os.environ.get("DARSEG_FULL") == "1"
"""Whether tests that take long run as well."""
thorough = pytest.mark.skipif(not FULL, reason="takes long: run with DARSEG_FULL=1")
settings.register_profile("sampled", settings(), max_examples=100 if FULL else 40)
settings.load_profile("sampled")  # the examples of laws that state no number; each run draws others


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="module")
def small_network() -> Iterator[None]:
    """resnet18_half with a quarter of its channels and one block a stage, also in commands of tests/forks.py.

    For files whose tests are about runs, and not about what a network learns: their time goes down by half.
    """
    from darseg.model.backbone import RESNETS  # imports torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RESNETS, "resnet18_half", forks.small_plan())
        patch.setenv(forks.SMALL, "1")
        yield


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks in every ResNet and four in every DINOv2, whose blocks are alike; all with DARSEG_FULL=1."""
    from darseg.model import backbone, vit  # these import torch

    if FULL:
        return
    for name, plan in backbone.RESNETS.items():
        monkeypatch.setitem(backbone.RESNETS, name, plan._replace(depths=(1, 1, 2, 1)))

    def create(name: str, create: Callable[..., Any] = vit._create, **how: Any) -> Any:
        return create(name, **({"depth": 4} if "dinov2" in name else {}), **how)

    monkeypatch.setattr(vit, "_create", create)


KILL_BEFORE = """
import itertools, os, signal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that this process had used would be lost to its forks

def kill_before(at):
    '''SIGKILL for this process before its at-th change of the disk; 0: never.'''
    changes = itertools.count(1)
    for name in ("replace", "unlink", "rmdir"):
        def change(*names, act=getattr(os, name), **options):
            if next(changes) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*names, **options)
        setattr(os, name, change)
"""
"""The beginning of scripts that fork and kill."""


def write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bgr = image if image.ndim == 2 else image[:, :, ::-1]
    assert cv2.imwrite(str(path), np.ascontiguousarray(bgr))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images and weights, if there is one (DARSEG_SHARED, or ../shared)."""
    folder = Path(os.environ.get("DARSEG_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data here: {folder} does not exist (set DARSEG_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in `images/`, labels in `labels/`: 4 labeled, 6 unlabeled (with truth), 3 for validation."""
    root = tmp_path_factory.mktemp("tiny")
    roles = {"validation": 3, "labeled": 4, "unlabeled": 6}
    index = 0
    for role, count in roles.items():
        ids = []
        for _ in range(count):
            name = f"{role[0]}/{index:02d}"
            image, label = draw_scene(7, index, SIZE)
            write_png(root / "images" / f"{name}.png", image)
            write_png(root / "labels" / f"{name}.png", label)
            ids.append(name)
            index += 1
        (root / f"{role}.txt").write_text("\n".join(ids) + "\n")
    return root


def recipe_dict(data: Path) -> dict:
    """Three short rounds of a small network, as plain values."""
    return {
        "seed": 3,
        "threads": 1,
        "data": {
            "root": str(data),
            "classes": list(SCENE_CLASSES.names),
            "labeled": "labeled.txt",
            "unlabeled": "unlabeled.txt",
            "validation": "validation.txt",
        },
        "network": {"backbone": "resnet18_half", "output_stride": 16, "head_channels": 16, "weights": "none"},
        "training": {"crop": [49, 65], "batch": 4, "learning_rate": 0.01, "checkpoint_every": 2},
        "labeling": {"window": [65, 81]},
        "rounds": [
            {"steps": 6},
            {"steps": 5, "labeling_ratio": 0.4},
            {"steps": 5, "labeling_ratio": 0.65, "scale": [0.5, 2.5]},
        ],
    }


@pytest.fixture
def recipe_file(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(tiny_data), sort_keys=False))
    return path


@pytest.fixture
def project(tiny_data: Path, recipe_file: Path, tmp_path: Path) -> Path:
    """A project folder: data/, tiny.yaml, and runs/tiny with a network of round 0."""
    # Here, since these import torch, which tests of most rooms do not need.
    from darseg.config.text import dump_recipe, load_recipe
    from darseg.model.weights import save_network
    from darseg.run.build import build_initial_network, manifest_of, spec_of
    from darseg.run.data_digest import digest_manifest
    from darseg.run.directory import RunDirectory, digest_path, open_run, write_json

    folder = tmp_path / "project"
    shutil.copytree(tiny_data, folder / "data")
    text = recipe_file.read_text().replace(str(tiny_data), "data")
    recipe_file.unlink()
    (folder / "tiny.yaml").write_text(text)
    recipe, run = load_recipe(folder / "tiny.yaml"), RunDirectory(folder / "runs" / "tiny")
    data = digest_manifest(manifest_of(recipe))
    open_run(run, recipe_text=dump_recipe(recipe), data=data, compare=lambda _: None)
    save_network(build_initial_network(recipe)[0], run.network(0), spec_of(recipe))
    outputs = {"network.safetensors": digest_path(run.network(0))}
    record = {"step": "train", "inputs": {}, "outputs": outputs, "seconds": 1.0, "facts": {}}
    write_json(run.record_path(0, "train"), record)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Exit code, standard output and standard error of a command, in this process."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["darseg", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@dataclass
class Visit:
    """A page in a browser, and what happened on it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    """Errors of the console and of scripts."""
    requests: list[str] = field(default_factory=list)
    """Addresses asked for, the page's own first."""

    def leaving_the_machine(self) -> list[str]:
        local = ("file:", "data:", "blob:", "about:", "http://127.0.0.1:")
        return [address for address in self.requests if not address.startswith(local)]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The system's Chromium, headless."""
    api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((program for program in map(shutil.which, names) if program), None)
    if path is None:
        pytest.skip(f"no Chromium here: none of {', '.join(names)} is installed")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    """Opens an address in a window of its own: visit(url, width=…, height=…, color_scheme="dark", …)."""
    contexts = []

    def open_page(url: str, width: int = 1280, height: int = 900, **options: Any) -> Visit:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        visited = Visit(context.new_page())
        visited.page.on(
            "console",
            lambda message: visited.errors.append(message.text) if message.type == "error" else None,
        )
        visited.page.on("pageerror", lambda error: visited.errors.append(str(error)))
        visited.page.on("request", lambda request: visited.requests.append(request.url))
        visited.page.goto(url)
        return visited

    yield open_page
    for context in contexts:
        context.close()
