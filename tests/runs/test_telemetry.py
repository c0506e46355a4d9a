"""minllama/runs/telemetry.py: the GPU's figures, the environment, a profile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.autograd import DeviceType

from minllama.runs import telemetry
from minllama.runs.telemetry import environment, gpu_telemetry, profile_summary, profiled

CPU = torch.device("cpu")


def test_no_telemetry_without_a_gpu() -> None:
    """Nothing is sampled and nothing is said."""
    assert gpu_telemetry(CPU)() == {}


def test_telemetry_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watts, and joules since the start, from NVML's milliwatts and millijoules; no error."""
    nvml = mock.MagicMock(NVMLError=ZeroDivisionError)
    nvml.nvmlDeviceGetTotalEnergyConsumption.side_effect = [5000, 7500, ZeroDivisionError]
    nvml.nvmlDeviceGetPowerUsage.return_value = 300_000
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="7"))
    sample = gpu_telemetry(torch.device("cuda"))
    nvml.nvmlDeviceGetHandleByUUID.assert_called_once_with("GPU-7")
    clock = [0.0, 0.0, 1.9, 2.0, 2.0]
    now = SimpleNamespace(monotonic=lambda: clock.pop(0))
    monkeypatch.setattr("minllama.runs.telemetry.time", now)
    figures = sample()
    assert (figures["gpu_power_watts"], figures["gpu_energy_joules"]) == (300, 2.5)
    assert sample() == figures and nvml.nvmlDeviceGetPowerUsage.call_count == 1
    assert sample() == {}
    nvml.nvmlInit.side_effect = ZeroDivisionError
    assert gpu_telemetry(torch.device("cuda"))() == {}


def test_the_environment_can_be_written_as_json() -> None:
    """Versions and the command, for run.json."""
    found = json.loads(json.dumps(environment()))
    assert found["torch"] == torch.__version__ and found["command"]


def test_the_commit_is_this_programs_own(tmp_path: Path, monkeypatch) -> None:
    """Unpacked inside another repository, a run recorded that one's commit as its own."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another program"]):
        subprocess.run([*git, *words], check=True)
    for where, known in ((tmp_path, True), (tmp_path / "vendor" / "minllama", False)):
        place = where / "minllama" / "runs" / "telemetry.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(telemetry, "__file__", str(place))
        assert (environment()["git_commit"] is not None) == known


def test_a_profile_that_is_not_asked_for(tmp_path: Path) -> None:
    """It costs nothing and leaves nothing."""
    with profiled(
        tmp_path / "profile.json.gz", enabled=False, device=CPU, save=lambda *_: 1 / 0
    ) as step_is_done:
        for _ in range(20):
            step_is_done()
    assert not list(tmp_path.iterdir())


def test_the_shares_of_a_profile() -> None:
    """A GPU has the phases once more, without the host's time, which was divided by."""

    def event(key: str, where: DeviceType, on_host: float, on_device: float) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=where, count=2, cpu_time_total=on_host,
            self_device_time_total=on_device,
        )  # fmt: skip

    phases = "data", "forward and backward", "optimizer"
    events = [event(name, DeviceType.CPU, 1000, 0) for name in phases]
    events += [event("aten::mm", DeviceType.CPU, 300, 500)]
    on_cpu = (
        "profile of 2 steps of 1.5 ms: waiting for data 33.33%, forward and backward 33.33%, "
        "optimizer 33.33%"
    )
    assert profile_summary(events) == on_cpu
    events += [event(name, DeviceType.CUDA, 0, 900) for name in (*phases, "ProfilerStep*")]
    events += [event("void at::native::(anonymous namespace)::adds<4>", DeviceType.CUDA, 0, 600)]
    assert profile_summary(events) == f"{on_cpu}; the GPU computed 20%"
