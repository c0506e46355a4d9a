"""What a run puts on record: metrics, the loss curve, GPU telemetry, the environment, a profile.

Knows records as plain dicts, and nothing of how a step is made.
"""

from __future__ import annotations

import contextlib
import gzip
import html
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.autograd import DeviceType
from tqdm import tqdm

from minllama.system.files import atomic_write, check_regular

LINE_BYTES = 1 << 20  # of a record; a longer line is none, and is not read at once
FIGURES, LARGEST = ("loss", "val_loss", "val_perplexity"), 1e305  # a damaged line may hold others
SPIKE_WINDOW, SPIKE_LEAST, SPIKE_STDS = 100, 20, 6.0  # losses looked back on; fewer tell nothing

# ---------------------------------------------------------------------------- metrics


class MetricsLog:
    """`metrics.jsonl`: one JSON line per optimizer step, each step once, also over resumes.

    `records` are the last `window` of them; the file alone holds the others, however long the run.
    """

    def __init__(self, path: Path, last_step: int, *, window: int = 1) -> None:
        """Open the log to continue after `last_step`; steps of later lines are made again."""
        self.path, self.window = path, window
        self.unwritten: list[dict[str, Any]] = []  # what the disk did not take
        self.file: BinaryIO | None = None
        self.rewind(last_step)

    def append(self, record: dict[str, Any]) -> None:
        """Add one step's record and hand it to the system, so that it outlives the process.

        Where the disk takes nothing it is kept in memory, and the next record brings it along.
        """
        self.records.append(record)
        self.unwritten.append(record)
        self._write()

    def rewind(self, last_step: int) -> None:
        """Take back what came after `last_step`: those steps are made again."""
        self.close()
        self.records: deque[dict[str, Any]] = deque(maxlen=self.window)
        self.end, found, written = 0, 0, 0  # of the lines that stay: where they end, how many
        for record, end in _whole_records(self.path):
            if written < record["step"] <= last_step:
                self.records.append(record)
                self.end, found, written = end, found + 1, record["step"]
        self.unwritten = [r for r in self.unwritten if written < r["step"] <= last_step]
        self.records.extend(self.unwritten)
        lost = last_step - found - len(self.unwritten)
        if lost:
            tqdm.write(f"note: {self.path} lacks {lost:,} of {last_step:,} steps, lost or damaged")
        self._write()

    def elapsed(self) -> float:
        """Seconds that the run has trained so far, over all its starts."""
        seconds = self.records[-1].get("elapsed") if self.records else None
        known = isinstance(seconds, int | float) and math.isfinite(seconds)
        return max(0.0, seconds) if known else 0.0

    def sync(self) -> None:
        """Flush the file to the disk: before a checkpoint, which must not know of lost records."""
        if self.file is not None:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                tqdm.write(f"warning: {self.path} was not flushed to the disk ({error})")

    def close(self) -> None:
        """Close the file; another record opens it again."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # closing flushes: a full disk fails again here
                self.file.close()
        self.file = None

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _write(self) -> None:
        data = "".join(json.dumps(record) + "\n" for record in self.unwritten).encode()
        try:
            if self.file is not None and not self._is_in_place():
                self.close()
                self.end = self.path.stat().st_size if self.path.exists() else 0
                tqdm.write(
                    f"warning: {self.path} was removed, renamed or replaced: what it held "
                    "is not in the new one"
                )
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
                flags |= getattr(os, "O_NOFOLLOW", 0)  # a link that somebody left is not followed
                self.file = os.fdopen(os.open(self.path, flags, 0o666), "ab")
                self.file.truncate(self.end)  # cuts off what a failed write or a crash left
            self.file.write(data)
            self.file.flush()
        except OSError as error:
            self.close()
            tqdm.write(f"warning: {self.path} was not written ({error}); the run continues")
        else:
            self.end += len(data)
            self.unwritten.clear()


def _whole_records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of a metrics file, and where in it each ends; damaged lines are left out.

    Raises UsageError for what is no file: to open a pipe would wait for ever.
    """
    end = 0
    if path.exists():
        check_regular(path)
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in iter(lambda: file.readline(LINE_BYTES), b""):
            end += len(line)
            record = None
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line) if line.endswith(b"\n") else None  # else cut by a crash
            if _is_sound(record):
                yield record, end


def _is_sound(record: Any) -> bool:
    """Whether this is a step's record, whose figures can be computed with."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    figures = [record["step"], *(record.get(name) for name in FIGURES)]
    return all(
        figure is None or (isinstance(figure, int | float) and abs(figure) < LARGEST)
        for figure in figures
    )


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, one by one; damaged lines are left out."""
    return (record for record, _ in _whole_records(path))


def finite_or_none(value: float) -> float | None:
    """The value as JSON can hold it, which has no NaN."""
    return value if math.isfinite(value) else None


def loss_curve_svg(records: list[dict[str, Any]], title: str) -> str:
    """The training and validation loss over the steps as an SVG picture for any browser."""
    width, height, left, top = 860, 460, 70, 50
    plot_width, plot_height = width - left - 30, height - top - 60
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    val = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    points = train + val
    if not points:
        return ""
    last_step = max(step for step, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0

    def place(step: float, loss: float) -> tuple[str, str]:
        x = left + plot_width * step / max(1, last_step)
        return f"{x:.1f}", f"{top + plot_height * (high - loss) / span:.1f}"

    def line(series: list[tuple[float, float]], color: str) -> str:
        path = " ".join(",".join(place(*point)) for point in series)
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="28" font-size="17">{html.escape(title)}</text>',
    ]
    for i in range(6):
        loss, step = low + span * i / 5, last_step * i / 5
        x, y = place(step, loss)
        parts += [
            f'<line x1="{left}" x2="{left + plot_width}" y1="{y}" y2="{y}" stroke="#ddd"/>',
            f'<text x="{left - 8}" y="{y}" dy="4" text-anchor="end">{loss:.2f}</text>',
            f'<text x="{x}" y="{height - 38}" text-anchor="middle">{step:,.0f}</text>',
        ]
    parts += [line(train, "#4477aa"), line(val, "#cc3311")]
    for x, y in itertools.starmap(place, val):
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="#cc3311"/>')
    parts += [
        f'<text x="{left + plot_width / 2}" y="{height - 12}" text-anchor="middle">'
        "optimizer step</text>",
        f'<text x="{left + plot_width - 210}" y="28" fill="#4477aa">training loss</text>',
        f'<text x="{left + plot_width - 100}" y="28" fill="#cc3311">validation loss</text>',
        "</svg>\n",
    ]
    return "\n".join(parts)


def note_spike(record: dict[str, Any], earlier: Iterable[dict[str, Any]]) -> None:
    """Report and record a loss far above those before it, in their standard deviations."""
    losses = [r["loss"] for r in earlier if r.get("loss") is not None]
    if record["loss"] is None or len(losses) < SPIKE_LEAST:
        return
    mean, std = float(np.mean(losses)), float(np.std(losses, ddof=1))
    if record["loss"] > mean + SPIKE_STDS * std:
        record["loss_spike"] = record["loss"] - mean
        tqdm.write(
            f"loss spike at step {record['step']:,}: {record['loss']:.3f}, where the last "
            f"{len(losses)} were {mean:.3f} +- {std:.3f}"
        )


def recompilations() -> Callable[[dict[str, Any]], None]:
    """What notes in a step's record that the model was compiled in it again, and says so.

    The first time is none: every step after it should find what was compiled there.
    """
    compiled, before = False, _compiled_frames()

    def note(record: dict[str, Any]) -> None:
        nonlocal compiled, before
        again, before = _compiled_frames() - before, _compiled_frames()
        if again and compiled:
            record["recompiled"] = again
            tqdm.write(f"recompiled: step {record['step']:,} took as long as the first for it")
        compiled |= again > 0

    return note


def _compiled_frames() -> int:
    """How many functions torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["frames"]["ok"] if dynamo else 0


# ---------------------------------------------------------------------------- telemetry

TELEMETRY_SECONDS = 2.0


def gpu_telemetry(device: torch.device) -> Callable[[], dict[str, float]]:
    """What samples an NVIDIA GPU through NVML: bytes in use, % busy, watts, joules since now.

    A sample is up to TELEMETRY_SECONDS old: NVML takes as long as a small model's step. It is an
    empty dict where these are unknown.
    """
    if device.type != "cuda":
        return dict  # called, it makes an empty one
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        energy = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except Exception:  # no driver, no permission, a GPU without the counter
        return dict

    taken, last = -math.inf, {}

    def sample() -> dict[str, float]:
        nonlocal taken, last
        if time.monotonic() - taken >= TELEMETRY_SECONDS:
            last, taken = read(), time.monotonic()
        return last

    def read() -> dict[str, float]:
        try:
            used = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) - energy
            return {
                "gpu_memory_used": nvml.nvmlDeviceGetMemoryInfo(gpu).used,
                "gpu_utilization": nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
                "gpu_power_watts": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
                "gpu_energy_joules": used / 1000,
            }
        except nvml.NVMLError:
            return {}

    return sample


def environment() -> dict[str, Any]:
    """Versions and machine of this run, for run.json."""
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, no repository
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
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

PHASES = ("data", "forward and backward", "optimizer")  # record_function's names in training
UNPROFILED_STEPS, PROFILED_STEPS = 2, 5  # the first compile and warm up
PROFILE_ROWS = 12
ATTENTION = "aten::_scaled_dot_product_"  # and then which of torch's: flash_attention, ...
NAMESPACES = re.compile(r"^void |at::native::|\(anonymous namespace\)::")


@contextlib.contextmanager
def profiled(
    path: Path, *, enabled: bool, device: torch.device, save: Callable[[Path, Callable], None]
) -> Iterator[Callable[[], None]]:
    """Profile a few steps where that is enabled; yields what to call after every step.

    A table is printed, and the trace goes to `path` through `save(path, write)`.
    """
    if not enabled:
        yield lambda: None
        return

    def report(profiler: torch.profiler.profile) -> None:
        if profiler.step_num > UNPROFILED_STEPS:  # else it ended within its first step
            save(path, lambda: write_trace(path, profiler))
            tqdm.write(profile_table(profiler, device))
            tqdm.write(f"  {path}: the trace, for chrome://tracing or ui.perfetto.dev")

    steps = torch.profiler.schedule(
        wait=UNPROFILED_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1
    )
    with torch.profiler.profile(schedule=steps, on_trace_ready=report, acc_events=True) as profiler:
        yield profiler.step
    if profiler.step_num <= UNPROFILED_STEPS:
        tqdm.write(f"--profile: a run of {UNPROFILED_STEPS} steps or fewer has none to profile")


def profile_table(profiler: torch.profiler.profile, device: torch.device) -> str:
    """Where the profiled steps' time went: on a CPU in torch's operations, on a GPU in kernels."""
    averages = [
        event
        for event in profiler.key_averages()
        if not event.key.startswith(("ProfilerStep*", "Optimizer."))  # brackets around others
    ]
    # A GPU's kernels are beside what the host did, and so are the phases again, as seen there.
    on_host = {event.key: event for event in averages if event.device_type == DeviceType.CPU}
    phases = {name: on_host.pop(name) for name in PHASES}
    steps = phases["data"].count
    total = sum(event.cpu_time_total for event in phases.values())  # in microseconds
    shares = ", ".join(
        f"{'waiting for data' if name == 'data' else name} {event.cpu_time_total / total:.2%}"
        for name, event in phases.items()
    )
    lines = [f"profile of {steps} steps of {total / steps / 1000:,.1f} ms: {shares}"]
    on_gpu = device.type == "cuda"
    times = {event.key: (event.count, event.self_cpu_time_total) for event in on_host.values()}
    if on_gpu:
        kernels = [e for e in averages if e.device_type == DeviceType.CUDA and e.key not in PHASES]
        times = {event.key: (event.count, event.self_device_time_total) for event in kernels}
        lines[0] += f"; the GPU computed {sum(taken for _, taken in times.values()) / total:.0%}"
    attention = [
        f"{name.removeprefix(ATTENTION).replace('_', ' ')} {event.count / steps:,.0f} times a step"
        for name, event in on_host.items()
        if name.startswith(ATTENTION) and "backward" not in name
    ]
    own = "this program's own, none of torch's"
    lines.append(f"  attention: {', '.join(attention) or own}")
    lines.append(f"  {'kernel' if on_gpu else 'operation':<48} calls/step   ms/step   share")
    slowest = sorted(times.items(), key=lambda item: item[1][1], reverse=True)
    lines += [
        f"  {NAMESPACES.sub('', name)[:48]:<48} {count / steps:>10,.0f} "
        f"{taken / steps / 1000:>9,.2f} {taken / total:>7.1%}"
        for name, (count, taken) in slowest[:PROFILE_ROWS]
    ]
    return "\n".join(lines)


def write_trace(path: Path, profiler: torch.profiler.profile) -> None:
    """Write a profile as compressed Chrome JSON."""
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as file:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        file.write(gzip.compress(plain.read_bytes()))
