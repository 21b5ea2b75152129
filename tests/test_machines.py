"""Two nodes of torchrun, each with its own code, data, home and path of the run folder: what one machine can show."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import forks
from conftest import recipe_dict, thorough
from darseg.training.processes import SILENCE, notice_silence
from test_processes import losses
from wording import says

pytestmark = pytest.mark.usefixtures("small_network")

PATIENCE = 180
"""Seconds in which a node must have ended, however busy the machine is."""

APART = """
import sys

def look(event, names):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove"):
        name = names[0].decode() if isinstance(names[0], bytes) else names[0]
        if isinstance(name, str) and name.startswith("{other}/"):
            raise FileNotFoundError(2, "this is on the other machine", name)

sys.addaudithook(look)
"""
"""Python's start-up file of a node: what belongs to the other is not there."""

DARSEG = """
import os, signal, sys

import forks
from darseg.cli import main
from darseg.run import streams

forks.keep_small()
sys.argv[0] = "darseg"
stream_batches = streams.stream_batches


def stream(*arguments, **options):
    for step, batch in enumerate(stream_batches(*arguments, **options), options["start"]):
        if (step, options["seed"][1:]) == (4, (0, 0)) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if os.environ.get("KILL_NODE") == os.environ["RANK"]:
                os.kill(os.getppid(), signal.SIGKILL)
            if os.environ["RANK"] in (os.environ.get("KILL_NODE"), os.environ.get("KILL_WORKER")):
                os.kill(os.getpid(), signal.SIGKILL)
        yield batch


streams.stream_batches = stream
main()
"""
"""The command line; as its round 0 asks for the batch of step 4, it is killed if the environment says so."""


@dataclass(frozen=True)
class Node:
    """A machine, as far as a folder can be: `mount/` leads to the folder that both share."""

    folder: Path

    def start(self, port: int, *command: str, restarts: int, **environment: str) -> subprocess.Popen:
        own = {name: str(self.folder / name.lower()) for name in ("HOME", "TMPDIR")}
        paths = os.pathsep.join((str(self.folder / "code"), str(forks.REPOSITORY / "tests")))
        torchrun = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id run"
        several = (*torchrun.split(), f"--rdzv-endpoint=localhost:{port}", f"--max-restarts={restarts}")
        return subprocess.Popen(
            [sys.executable, *several, *command],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | own | environment,
            stdout=(self.folder / "out.txt").open("w"),
            stderr=(self.folder / "err.txt").open("w"),
        )

    @property
    def said(self) -> str:
        return (self.folder / "out.txt").read_text() + (self.folder / "err.txt").read_text()


@dataclass(frozen=True)
class Machines:
    """Two nodes and the run folder that they share."""

    nodes: tuple[Node, Node]
    run: Path

    def together(self, *command: str, restarts: int = 0, **environment: str) -> list[int]:
        """The exit codes of both nodes, which start the same command and end in time."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [node.start(port, *command, restarts=restarts, **environment) for node in self.nodes]
        try:
            end = time.monotonic() + PATIENCE
            return [process.wait(max(1, end - time.monotonic())) for process in started]
        except subprocess.TimeoutExpired:
            pytest.fail(self.said)
        finally:
            for process in started:
                process.kill()

    @property
    def said(self) -> str:
        return "\n".join(node.said for node in self.nodes)

    def events(self, name: str) -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in (self.run / "journal.jsonl").open()]
        return [entry for entry in entries if entry["event"] == name]


TRAIN = ("command.py", "train", "tiny.yaml", "--out", "mount/run")


APART_AGAIN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Processes that are started again meet in a place of their own."""


def recipe_of(data: Path) -> dict[str, Any]:
    values = recipe_dict(data)
    values["network"]["head_channels"] = 8
    values["training"] |= {"batch": 8, "half_batch": 4, "workers": 1}
    values["rounds"] = [{"steps": 6}, {"steps": 3, "labeling_ratio": 0.5}]
    return values


@pytest.fixture
def machines(tiny_data: Path, tmp_path: Path) -> Machines:
    (tmp_path / "shared").mkdir()
    nodes = []
    for name, other in (("a", "b"), ("b", "a")):
        folder = tmp_path / name
        shutil.copytree(forks.REPOSITORY / "src", folder / "code")
        shutil.copytree(tiny_data, folder / "data")
        for own in ("home", "tmpdir"):
            (folder / own).mkdir()
        (folder / "code/sitecustomize.py").write_text(APART.format(other=tmp_path / other))
        (folder / "command.py").write_text(DARSEG)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe_of(folder / "data")))
        (folder / "mount").symlink_to(tmp_path / "shared")
        nodes.append(Node(folder))
    return Machines((nodes[0], nodes[1]), tmp_path / "shared/run")


def results(run: Path) -> dict[str, bytes]:
    """The files that hold results: without times, paths and the machine."""
    names = ("network.safetensors", "optimizer.safetensors", "scores.json", "histogram.npz", "images.json")
    paths = [path for path in sorted(run.rglob("*")) if path.name in names or path.suffix == ".png"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def test_two_nodes_go_on_after_one_was_killed(machines: Machines, tiny_data: Path, tmp_path: Path) -> None:
    """To the bytes of two processes of one machine that nobody killed."""
    codes = machines.together(*TRAIN, KILL_NODE="1")
    assert sorted(codes) == [-signal.SIGKILL, 1], machines.said
    message = [line for line in machines.said.splitlines() if line.startswith("darseg: ")]
    assert len(message) == 1, machines.said
    says(message[0], "another process of this run", "same command again", vary=[r"\((.*?)\)"])
    assert machines.events("stopped") and not (machines.run / "round_0/train.json").exists()
    assert machines.together(*TRAIN) == [0, 0], machines.said
    assert "going on at step" in machines.said
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_of(tiny_data)))
    ended = forks.torchrun("-m", "darseg", "train", "tiny.yaml", "--out", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    expected = results(tmp_path / "run")
    assert len(expected) == 8 + 6  # label maps of 6 unlabeled images
    assert results(machines.run) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which connections a process has")
def test_connections_to_silent_machines_end() -> None:
    """The system is asked to; that it does was tried with a network that was switched off (docs/scale.md)."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
        accepted, _ = server.accept()
        before = len(os.listdir("/proc/self/fd"))
        notice_silence()
        assert len(os.listdir("/proc/self/fd")) == before
        for connection in (client, accepted):
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count, unconfirmed = (
                connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
                for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT")
            )
            assert idle + count * interval == unconfirmed / 1000 == SILENCE
        accepted.close()


@thorough
def test_a_killed_worker_is_started_again(machines: Machines) -> None:
    """By torchrun, on the first node, which holds the lock; both go on from the checkpoint."""
    assert machines.together(*TRAIN, restarts=1) == [1, 1]
    message = next(line for line in machines.said.splitlines() if line.startswith("darseg: "))
    says(message, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "--max-restarts")
    assert machines.together(*TRAIN, restarts=1, KILL_WORKER="0", **APART_AGAIN) == [0, 0], machines.said
    assert "going on at step 4" in machines.said
    assert len(machines.events("finished")) == 1
    steps = [event["step"] for event in machines.events("step") if event["round"] == 0]
    assert steps[-1] == 5  # counted from 0


@thorough
def test_one_process_goes_on_with_the_run_of_two_nodes(machines: Machines, tmp_path: Path) -> None:
    codes = machines.together(*TRAIN, KILL_NODE="0")
    assert -signal.SIGKILL in codes and 0 not in codes, machines.said
    ended = forks.python("-m", "darseg", *TRAIN[1:], cwd=machines.nodes[1].folder)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert any("processes 2 → 1" in line for line in lines) and any("step 4 of 6" in line for line in lines)
    assert len(json.loads((machines.run / "summary.json").read_text())["rounds"]) == 2


APART_TOGETHER = """
import os, sys

sys.argv[0] = "darseg"
os.chdir(sys.argv.pop(1 + int(os.environ["RANK"])))
del sys.argv[1]
with open("code/sitecustomize.py") as file:
    exec(file.read())

from darseg.cli import main

try:
    main()
except SystemExit as end:
    with open("code.txt", "w") as file:
        file.write(str(end.code))
"""
"""The command line on both nodes, without torchrun, which takes longer; its exit code goes to a file of the node."""


def test_nodes_with_other_data_or_recipes_do_nothing(machines: Machines) -> None:
    folder = machines.nodes[1].folder
    values = recipe_of(folder / "data")
    values["training"]["learning_rate"] = 0.02
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    with next((folder / "data/images/u").iterdir()).open("ab") as image:
        image.write(b"longer")
    folders = [node.folder for node in machines.nodes]
    ended = forks.torchrun("-c", APART_TOGETHER, *folders, *TRAIN[1:], cwd=folders[0].parent)
    assert [(folder / "code.txt").read_text() for folder in folders] == ["2", "2"], ended.stderr
    message = [line for line in ended.stderr.splitlines() if line.startswith(("darseg: ", "  - "))]
    says("\n".join(message), "the recipe (training.learning_rate)", "the unlabeled images and labels")
    assert not machines.run.exists()


def label(machines: Machines, count: int, out: str) -> Path:
    """The folder of labels that so many nodes make with the run's network."""
    command = ("label", "mount/run", "data/images/u", f"mount/{out}", "data.root=data")
    if count == 2:
        assert machines.together("command.py", *command) == [0, 0], machines.said
    else:
        ended = forks.python("-m", "darseg", *command, cwd=machines.nodes[0].folder)
        assert ended.returncode == 0, ended.stderr
    return machines.run.parent / out


@thorough
def test_two_nodes_label_as_one_process_does(machines: Machines) -> None:
    ended = forks.python("-m", "darseg", *TRAIN[1:], cwd=machines.nodes[0].folder)
    assert ended.returncode == 0, ended.stderr
    one, two = (label(machines, count, f"labels_{count}") for count in (1, 2))
    maps = sorted(path.name for path in one.glob("*.png"))
    assert len(maps) == 6
    for name in (*maps, "histogram.npz"):
        assert (two / name).read_bytes() == (one / name).read_bytes()


@thorough
def test_two_nodes_have_the_losses_of_one_process(machines: Machines, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    expected = np.array(losses(1, 0, None))
    for node in machines.nodes:
        (node.folder / "two.py").write_text(
            "import json, torch, torch.distributed as dist\n"
            "import forks\n"
            "forks.keep_small()\n"
            "torch.set_num_threads(1)\n"
            "dist.init_process_group('gloo')\n"
            "from darseg.training.processes import disconnect\n"
            "from test_processes import losses\n"
            "reported = losses(2, dist.get_rank(), None)\n"
            "if dist.get_rank() == 0: json.dump(reported, open('mount/losses.json', 'w'))\n"
            "disconnect()\n"
        )
    assert machines.together("two.py") == [0, 0], machines.said
    reported = np.array(json.loads((machines.run.parent / "losses.json").read_text()))
    assert np.abs(reported - expected).max() < 1e-6  # as in test_processes.py
