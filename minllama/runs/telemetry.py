"""What a run measures beside its loss: the GPU through NVML, the environment, a profile.

Of how a step is made it knows only the names of the phases.
"""

from __future__ import annotations

import contextlib
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from tqdm import tqdm

from minllama.system.files import atomic_write

TELEMETRY_SECONDS = 2.0

DATA, BACKWARD, OPTIMIZER = PHASES = ("data", "forward and backward", "optimizer")
UNPROFILED_STEPS, PROFILED_STEPS = 2, 5  # the first steps compile and warm up
PROFILE_ROWS = 12

# ---------------------------------------------------------------------------- the machine


def gpu_telemetry(device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that samples an NVIDIA GPU: bytes in use, % busy, watts, joules since now.

    A sample is up to TELEMETRY_SECONDS old, since NVML takes as long as a small model's step, and
    an empty dict where there is no NVML.
    """
    if device.type != "cuda":
        return dict  # called, it returns an empty one
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        energy_before = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except Exception:  # no driver, no permission, a GPU without the counter
        return dict

    taken, last = -math.inf, {}

    def sample() -> dict[str, float]:
        nonlocal taken, last
        if time.monotonic() - taken < TELEMETRY_SECONDS:
            return last
        try:
            energy = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) - energy_before  # millijoules
            last = {
                "gpu_memory_used": nvml.nvmlDeviceGetMemoryInfo(gpu).used,
                "gpu_utilization": nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
                "gpu_power_watts": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
                "gpu_energy_joules": energy / 1000,
            }
        except nvml.NVMLError:
            last = {}
        taken = time.monotonic()
        return last

    return sample


def environment() -> dict[str, Any]:
    """Versions, machine and command of this run, for run.json."""
    commit, root = None, Path(__file__).parents[2]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError):  # no git, no HEAD
        command = ["git", "-C", str(root), "rev-parse", "HEAD", "--show-toplevel"]
        output = subprocess.check_output(command, encoding="utf-8", stderr=subprocess.DEVNULL)
        head, repository = output.splitlines()
        if Path(repository).samefile(root):  # else the program lies in another one's repository
            commit = head
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "git_commit": commit,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


# ---------------------------------------------------------------------------- profile


@contextlib.contextmanager
def profiled(
    path: Path, *, enabled: bool, device: torch.device, save: Callable[[Path, Callable], None]
) -> Iterator[Callable[[], None]]:
    """Profile a few steps; yields a function to call after every step.

    Prints where their time went; the trace goes to `path` through `save(path, write)`.
    """
    if not enabled:
        yield lambda: None
        return

    def report(profiler: torch.profiler.profile) -> None:
        if profiler.step_num > UNPROFILED_STEPS:  # else the run ended before a profiled step
            save(path, lambda: write_trace(path, profiler))
            averages = profiler.key_averages()
            column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            tqdm.write(profile_summary(averages))
            tqdm.write(averages.table(sort_by=column, row_limit=PROFILE_ROWS))
            tqdm.write(f"{path}: the trace, for chrome://tracing or ui.perfetto.dev")

    steps = torch.profiler.schedule(
        wait=UNPROFILED_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1
    )
    with torch.profiler.profile(schedule=steps, on_trace_ready=report, acc_events=True) as profiler:
        yield profiler.step
    if profiler.step_num <= UNPROFILED_STEPS:
        tqdm.write(f"--profile: a run of {UNPROFILED_STEPS} steps or fewer has none to profile")


def profile_summary(averages: Iterable[FunctionEventAvg]) -> str:
    """One line: milliseconds per step, the phases' shares, and how busy a GPU is."""
    # The profiler has each phase a second time, as the span of its kernels on the GPU.
    phases = {e.key: e for e in averages if e.key in PHASES and e.device_type == DeviceType.CPU}
    steps = phases["data"].count
    total = sum(event.cpu_time_total for event in phases.values())  # microseconds
    shares = [f"{name} {phases[name].cpu_time_total / total:.2%}" for name in PHASES]
    kernels = [
        event.self_device_time_total
        for event in averages
        if event.device_type == DeviceType.CUDA
        and event.key not in PHASES
        and not event.key.startswith(("ProfilerStep*", "Optimizer."))  # spans of kernels, too
    ]
    busy = f"; the GPU computed {sum(kernels) / total:.0%}" if kernels else ""
    return (
        f"profile of {steps} step{'s' * (steps > 1)} of {total / steps / 1000:,.1f} ms: "
        f"waiting for {', '.join(shares)}{busy}"
    )


def write_trace(path: Path, profiler: torch.profiler.profile) -> None:
    """Write a profile as compressed Chrome JSON."""
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as file:
        trace = Path(folder) / path.name  # compressed by torch, since it ends in .gz
        profiler.export_chrome_trace(str(trace))
        file.write(trace.read_bytes())
