"""Commands in processes of their own, forked from one that has imported PyTorch: a fresh one takes seconds to.

The process that forks imports and computes nothing else, so it has no threads and holds no GPU.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from darseg.model.backbone import ResNetPlan

SECONDS = 300  # after which a command is killed
REPOSITORY = Path(__file__).parents[1]
PATHS = (str(REPOSITORY / "src"), str(REPOSITORY / "tests"))
SMALL = "DARSEG_TESTS_SMALL"
"""Set in the environment of commands that take `small_plan` for resnet18_half."""


def small_plan() -> ResNetPlan:
    """A ResNet that has each kind of block and layer once: a step takes little more than PyTorch's overhead."""
    from darseg.model.backbone import BasicBlock, ResNetPlan

    return ResNetPlan(BasicBlock, (1, 1, 1, 1), width=8)


def keep_small() -> None:
    """Take `small_plan` in this process, if the environment says so."""
    if SMALL in os.environ:
        from darseg.model.backbone import RESNETS

        RESNETS["resnet18_half"] = small_plan()


def python(*command: object, count: int = 1, cwd: Path | None = None, **environment: str) -> Any:
    """What `python command…` exits with and writes: a module (-m), a program (-c) or a script, with its arguments.

    Args:
        count: how many processes run it together, as torchrun starts them; the first that fails ends the others.
    """
    words, several = list(map(str, command)), {}
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        several |= {"LOCAL_WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = {"command": words, "cwd": str(cwd or Path.cwd()), "out": str(out), "err": str(err)}
        job |= {"environment": {**os.environ, "OMP_NUM_THREADS": "1", **several, **environment}}
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job | {"count": count}) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def torchrun(*command: object, cwd: Path | None = None, **environment: str) -> Any:
    """`python` by two processes together."""
    return python(*command, count=2, cwd=cwd, **environment)


@functools.cache
def _server() -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def end() -> None:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.close()
        server.wait()
        server.stdout.close()

    atexit.register(end)
    return server


# --- in the process that forks


def serve() -> dict[str, Any] | None:
    """Fork for each job that is read, and write its exit code; returns the job in a fork, None at the end."""
    while line := sys.stdin.readline():
        job = json.loads(line)
        children = []
        for rank in range(job["count"]):
            child = os.fork()
            if not child:
                if job["count"] > 1:
                    job["environment"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                return job
            children.append(child)
        print(wait(children), flush=True)
    return None


def wait(children: list[int]) -> int:
    """The exit code of the first process that fails, after which the others are ended; 0 if none does."""
    code, running, until = 0, list(children), time.monotonic() + SECONDS
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            running.remove(child)
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                for other in running:
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > until:
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return code


def become(job: dict[str, Any]) -> None:
    """Run a job's command as the program of this process."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, descriptor in enumerate(
        (os.open(os.devnull, os.O_RDONLY), os.open(job["out"], flags), os.open(job["err"], flags))
    ):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    keep_small()
    first, *arguments = job["command"]
    if first == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path[0] = ""
        names = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(arguments[0], "<string>", "exec"), names)
    elif first == "-m":
        sys.argv = arguments
        sys.path[0] = ""
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        sys.path[0] = str(Path(first).absolute().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import torch._dynamo  # loading weights imports it, in 2 s
    import torch.distributed
    import torch.utils.tensorboard  # noqa: F401

    import darseg.cli
    import darseg.run.label
    import darseg.run.redistribute
    import darseg.run.rounds  # noqa: F401

    gc.freeze()  # so that the forks end faster
    os.fsync = lambda descriptor: None  # as in conftest.py
    if (work := serve()) is not None:
        become(work)
