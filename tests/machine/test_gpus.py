"""minllama/machine/gpus.py: which GPU a name means, its peak, and a peak that is measured."""

from __future__ import annotations

import pytest
import torch

from minllama.machine import gpus
from minllama.machine.gpus import GPUS, find_gpu, measured_flops, peak_flops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 494),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", 835, 417),
        ("NVIDIA H200", 989, 494),
        ("NVIDIA H200 NVL", 835, 417),
        ("NVIDIA GH200 480GB", 989, 494),
        ("NVIDIA B200", 2250, 1125),
        ("NVIDIA GB200", 2500, 1250),
        ("NVIDIA B300 SXM6 AC", 2250, 1125),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA A100-PCIE-40GB", 312, 156),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA A10", 125, 62.5),
        ("NVIDIA A10G", 70, 35),
        ("Tesla V100-SXM2-16GB", 125, 15.7),
        ("Tesla V100-PCIE-32GB", 112, 14),
        ("Tesla T4", 65, 8.1),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("NVIDIA GeForce RTX 5090", 209, 105),
        ("NVIDIA RTX A6000", 155, 77),
        ("NVIDIA RTX 6000 Ada Generation", 364, 182),
    ],
)
def test_the_peak_of_a_known_gpu(name, bfloat16, float32, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whole words of its name: an L40S is no L4, an H100 NVL no H100 with NVLink all round.

    Without sparsity; in float32 that of TF32, which training uses, or without it FP32's.
    """
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for dtype, tflops in (("bfloat16", bfloat16), ("float16", bfloat16), ("float32", float32)):
        assert peak_flops(CUDA, getattr(torch, dtype)) == tflops * 1e12


def test_the_peaks_of_a_table_are_in_proportion() -> None:
    """TF32 has half of bfloat16's rate wherever there is TF32: a slip of the pen would show."""
    for name, gpu in GPUS.items():
        half = gpu.float32_tflops / gpu.tflops
        assert name in ("V100", "V100-PCIE", "T4") or 0.49 < half < 0.51, name


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce GTX 1080",
        "AMD Instinct MI300X",
    ],
)
def test_a_gpu_that_is_not_known_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is named after another, but is slower or faster: with a product that is large
    enough for a GPU, where 1,024 is not."""
    assert find_gpu(name) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(gpus, "measured_flops", lambda device, dtype, *, width: float(width))
    assert peak_flops(CUDA, torch.bfloat16) == 8192


def test_the_peak_of_this_cpu() -> None:
    """No data sheet has it: timed, and somewhere where CPUs are. The run's random numbers stay."""
    before = torch.get_rng_state()
    assert 1e8 < peak_flops(CPU, torch.float32) < 1e15
    assert 1e6 < measured_flops(CPU, torch.bfloat16, width=64) < 1e15
    assert torch.equal(before, torch.get_rng_state())
