"""Where the time goes: summaries of torch.profiler as plain numbers, for steps of training and images of labeling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from host import now
from torch.profiler import ProfilerActivity, profile

SHOWN = 12  # operations and kernels in each list

WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaEventQuery",
    "cudaMemcpy",
    "cudaMalloc",
    "cudaFree",
    "cudaHostAlloc",
    "cudaHostRegister",
    "cudaFreeHost",
    "aten::_local_scalar_dense",
)
"""Calls that make the host wait or ask for the GPU, or that take long by themselves."""

LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
)


class Window:
    """Profiles the steps after `first`, `count` of them, of a loop that calls `look` after each step."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.last, self.count = first, first + count, count
        self.profiler = profiler()
        self.seconds = 0.0

    def look(self, step: int) -> None:
        """Begin after step `first`, end after step `first` + `count`."""
        if step == self.first:
            now()
            self.profiler.start()
            self.seconds = -time.perf_counter()
        elif step == self.last:
            self.seconds += now()
            self.profiler.stop()

    def summary(self) -> dict[str, Any]:
        """The figures of one step."""
        return summarized(self.profiler, self.seconds, self.count)


def profiler() -> profile:
    """A profiler of the CPU and, if there is one, the GPU."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def profiled(run: Callable[[], object], count: int) -> dict[str, Any]:
    """The figures of one of the `count` equal pieces of work that `run` does."""
    recording = profiler()
    now()
    recording.start()
    began = time.perf_counter()
    run()
    seconds = now() - began
    recording.stop()
    return summarized(recording, seconds, count)


def summarized(recording: profile, seconds: float, count: int) -> dict[str, Any]:
    """Milliseconds and numbers per piece of work; the profiler itself slows the host down.

    Returns:
        `ms`: by the clock; `gpu_ms`: kernels and copies on the GPU; `cpu_ms`: operations on the host; `kernels`,
        `launches`; `waits`, and `runtime` for all of CUDA's calls: name → milliseconds and number; `top_gpu`, `top_cpu`:
        what takes longest.
    """
    kernels: dict[str, list[float]] = {}
    host: dict[str, list[float]] = {}
    for event in recording.events() or ():
        on_gpu = event.device_type != torch.autograd.DeviceType.CPU
        if on_gpu and getattr(event, "is_user_annotation", False):
            continue  # a range around kernels, which would count them twice
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        entry = (kernels if on_gpu else host).setdefault(event.name, [0.0, 0])
        entry[0] += microseconds / 1000
        entry[1] += 1

    def each(entry: list[float]) -> dict[str, float]:
        return {"ms": entry[0] / count, "calls": entry[1] / count}

    def top(table: dict[str, list[float]]) -> list[dict[str, Any]]:
        largest = sorted(table.items(), key=lambda item: -item[1][0])[:SHOWN]
        return [{"name": name[:120]} | each(entry) for name, entry in largest]

    copies = [name for name in kernels if name.startswith(("Memcpy", "Memset"))]
    return {
        "ms": 1000 * seconds / count,
        "gpu_ms": sum(entry[0] for entry in kernels.values()) / count,
        "cpu_ms": sum(entry[0] for entry in host.values()) / count,
        "kernels": sum(entry[1] for name, entry in kernels.items() if name not in copies) / count,
        "launches": sum(host[name][1] for name in LAUNCHES if name in host) / count,
        "copies": {name: kernels[name][1] / count for name in copies},
        "waits": {name: each(host[name]) for name in WAITS if name in host},
        "runtime": {name: each(entry) for name, entry in host.items() if name.startswith("cu")},
        "top_gpu": top(kernels),
        "top_cpu": top(host),
    }
