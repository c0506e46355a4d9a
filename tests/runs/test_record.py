"""minllama/runs/record.py: metrics.jsonl, the loss curve, spikes, the environment, a profile."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch
from torch.autograd import DeviceType

from minllama.runs.record import (
    SPIKE_LEAST,
    MetricsLog,
    environment,
    gpu_telemetry,
    loss_curve_svg,
    note_spike,
    profile_table,
    profiled,
    read_records,
    recompilations,
)
from minllama.system.errors import UsageError

CPU = torch.device("cpu")


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


# ---------------------------------------------------------------------------- metrics


class TornFile(io.BytesIO):
    """A disk that fills up in the middle of a line."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.real = path.open("ab")

    def fileno(self) -> int:
        return self.real.fileno()

    def write(self, data: bytes) -> int:
        with self.real:
            self.real.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_records_that_the_disk_does_not_take_come_later(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A full disk ended the run in the middle of a line of metrics.jsonl."""
    log = MetricsLog(tmp_path / "metrics.jsonl", last_step=0)
    log.append({"step": 1})
    log.close()
    log.file = TornFile(log.path)
    log.append({"step": 2})
    assert log.path.read_text(encoding="utf-8") == '{"step": 1}\n{"ste'
    log.file = TornFile(log.path)
    log.append({"step": 3})
    log.rewind(2)
    log.append({"step": 3})
    log.sync()
    log.close()
    assert steps(log.path) == [1, 2, 3]
    assert "metrics.jsonl was not written" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_log_that_is_a_pipe_is_refused(tmp_path) -> None:
    """A resumed run waited at it for ever."""
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match="metrics.jsonl: not a regular file"):
        MetricsLog(tmp_path / "metrics.jsonl", last_step=1)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_log_that_is_taken_away_begins_anew(replaced, tmp_path, capsys) -> None:
    """Its file removed, the run wrote into nowhere and ended with status 0 and without a log.

    What somebody put in its place, as editors do, is not cut off.
    """
    log = MetricsLog(tmp_path / "metrics.jsonl", last_step=0)
    log.append({"step": 1})
    log.path.rename(tmp_path / "elsewhere.jsonl")
    if replaced:
        log.path.write_bytes((tmp_path / "elsewhere.jsonl").read_bytes())
    log.append({"step": 2})
    log.append({"step": 3})
    log.close()
    assert steps(log.path) == ([1, 2, 3] if replaced else [2, 3])
    assert capsys.readouterr().out.count("was removed, renamed or replaced") == 1
    MetricsLog(log.path, last_step=3).close()
    assert ("lacks 1 of 3 steps" in capsys.readouterr().out) != replaced


@pytest.mark.parametrize("value", ["1" + "0" * 400, '"x"', "[]", "NaN", "{}", "-Infinity"])
@pytest.mark.parametrize("name", ["step", "loss", "val_loss", "val_perplexity"])
def test_a_line_whose_figures_are_none_is_left_out(name, value, tmp_path) -> None:
    """The picture of the losses, drawn after the training, ended in a traceback."""
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 2.5}', f'{{"step": 2, "loss": 2, "{name}": {value}}}']
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    assert steps(path) == [1] and loss_curve_svg([*read_records(path)], "a")


def test_a_line_that_a_crash_cut_is_written_again(tmp_path: Path) -> None:
    """Each step is in the file once, whatever was in it after the last checkpoint."""
    path = tmp_path / "metrics.jsonl"
    assert steps(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', encoding="utf-8")
    assert steps(path) == [1, 2, 3]
    log = MetricsLog(path, last_step=2, window=2)
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'
    assert [record["step"] for record in log.records] == [1, 2]
    log.append({"step": 3})
    log.close()
    assert steps(path) == [1, 2, 3]


def test_a_long_run_does_not_grow_by_its_records(tmp_path: Path) -> None:
    """All records once stayed in memory: a gigabyte in a run of a million steps."""
    log = MetricsLog(tmp_path / "metrics.jsonl", last_step=0, window=3)
    for step in range(1, 11):
        log.append({"step": step})
    assert [record["step"] for record in log.records] == [8, 9, 10] and not log.unwritten
    log.rewind(5)
    assert [record["step"] for record in log.records] == [3, 4, 5]
    log.append({"step": 6})
    log.close()
    assert steps(log.path) == [1, 2, 3, 4, 5, 6]


def test_a_record_outlives_the_process_at_once(tmp_path: Path) -> None:
    """It is handed to the system line by line: a run can be watched, and killed."""
    log = MetricsLog(tmp_path / "metrics.jsonl", last_step=0)
    for step in (1, 2):
        log.append({"step": step})
        assert steps(log.path)[-1] == step
    log.close()


# ---------------------------------------------------------------------------- the loss curve

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("losses", [[4.0, 3.5, 3.0, 2.0], [2.5] * 4, [1e9, 0.0, 1.0, 2.0], [3.0]])
def test_the_loss_curve_is_a_picture(losses: list[float]) -> None:
    """Well-formed, whatever the title, with every point inside and the best loss at the bottom."""
    records = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    records[-1]["val_loss"] = losses[0]
    records.append({"step": len(losses), "loss": None})
    picture = ElementTree.fromstring(loss_curve_svg(records, 'a & b <c> "d"'))
    _, _, width, height = map(float, picture.get("viewBox").split())
    train, val = (line.get("points").split() for line in picture.iter(f"{SVG}polyline"))
    assert len(train) == len(losses) and len(val) == 1
    points = [tuple(map(float, point.split(","))) for point in [*train, *val]]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    heights = [y for _, y in points[: len(losses)]]
    assert heights.index(max(heights)) == losses.index(min(losses))
    assert 'a & b <c> "d"' in [text.text for text in picture.iter(f"{SVG}text")]


def test_no_losses_no_curve() -> None:
    """A run that was stopped before its first step."""
    assert loss_curve_svg([], "a") == loss_curve_svg([{"step": 1, "loss": None}], "a") == ""


# ---------------------------------------------------------------------------- spikes


def test_a_loss_spike_is_said_and_recorded(capsys: pytest.CaptureFixture) -> None:
    """Far above the losses before it, in their own spread; a noisy loss is no spike."""
    pick = random.Random(0)
    earlier = [{"step": i, "loss": pick.gauss(3, 0.1)} for i in range(100)] + [{"loss": None}]
    for loss, spike in ((3.3, False), (2.0, False), (None, False), (4.0, True)):
        record = {"step": 100, "loss": loss}
        note_spike(record, earlier)
        assert ("loss_spike" in record) == spike
        assert ("loss spike at step 100: " in capsys.readouterr().out) == spike
        if spike:
            assert record["loss_spike"] == pytest.approx(1.0, abs=0.05)
    few = {"step": 5, "loss": 9.0}
    note_spike(few, earlier[: SPIKE_LEAST - 1])
    assert "loss_spike" not in few


# ---------------------------------------------------------------------------- the rest


def test_a_model_that_is_compiled_again_is_noted(capsys) -> None:
    """The first time is expected, in whichever step it comes; another shape is no news to torch."""
    function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    note, noted = recompilations(), []
    for size in (None, 3, 3, 4, 3):
        if size is not None:
            function(torch.ones(size))
        record = {"step": len(noted) + 1}
        note(record)
        noted.append(record.get("recompiled"))
    assert noted == [None, None, None, 1, None]
    assert capsys.readouterr().out.count("recompiled: step 4") == 1


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
    monkeypatch.setattr("minllama.runs.record.time", now)
    found = sample()
    assert (found["gpu_power_watts"], found["gpu_energy_joules"]) == (300, 2.5)
    assert sample() == found and nvml.nvmlDeviceGetPowerUsage.call_count == 1
    assert sample() == {}
    nvml.nvmlInit.side_effect = ZeroDivisionError
    assert gpu_telemetry(torch.device("cuda"))() == {}


def test_the_environment_can_be_written_as_json() -> None:
    """Versions and the command, for run.json."""
    found = json.loads(json.dumps(environment()))
    assert found["torch"] == torch.__version__ and found["command"]


def test_a_profile_that_is_not_asked_for(tmp_path: Path) -> None:
    """It costs nothing and leaves nothing."""
    with profiled(
        tmp_path / "profile.json.gz", enabled=False, device=CPU, save=lambda *_: 1 / 0
    ) as step_is_done:
        for _ in range(20):
            step_is_done()
    assert not list(tmp_path.iterdir())


def test_a_gpus_profile_is_of_kernels() -> None:
    """A GPU has the phases once more, without the host's time, which was divided by."""

    def event(key: str, where: DeviceType, on_host: float, on_device: float) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=where, count=2, cpu_time_total=on_host,
            self_cpu_time_total=on_host, self_device_time_total=on_device,
        )  # fmt: skip

    phases = "data", "forward and backward", "optimizer"
    found = [event(name, DeviceType.CPU, 1000, 0) for name in phases]
    found += [event(name, DeviceType.CUDA, 0, 900) for name in phases]
    found += [event("aten::mm", DeviceType.CPU, 300, 500)]
    found += [event("aten::_scaled_dot_product_cudnn_attention", DeviceType.CPU, 10, 0)]
    found += [event("void at::native::(anonymous namespace)::adds<4>", DeviceType.CUDA, 0, 600)]
    table = profile_table(SimpleNamespace(key_averages=lambda: found), torch.device("cuda"))
    assert table.splitlines() == [
        "profile of 2 steps of 1.5 ms: waiting for data 33.33%, forward and backward 33.33%, "
        "optimizer 33.33%; the GPU computed 20%",
        "  attention: cudnn attention 1 times a step",
        f"  {'kernel':<48} calls/step   ms/step   share",
        f"  {'adds<4>':<48}          1      0.30   20.0%",
    ]
