"""GPUs by their makers' data sheets, and the peak FLOP/s that MFU is measured against."""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import torch

from minllama.machine.device import dtype_name, training_arithmetic


class Gpu(NamedTuple):
    """A GPU by its maker's data sheet, the rates without sparsity."""

    tflops: float  # of bfloat16 matrix products summed in float32 (V100, T4: float16)
    float32_tflops: float  # of float32 ones as in training: in TF32 where the GPU has it
    memory_gb: float
    link_gb_s: float  # GB/s each way to another GPU of the machine: NVLink, else PCIe

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of training in this dtype."""
        return 1e12 * (self.float32_tflops if dtype == "float32" else self.tflops)


# By words in torch's name of the device; the first key that matches counts.
GPUS = {
    "B300": Gpu(2250, 1125, 270, 900),
    "GB200": Gpu(2500, 1250, 186, 900),
    "B200": Gpu(2250, 1125, 180, 900),
    "GH200": Gpu(989, 494, 96, 450),
    "H200 NVL": Gpu(835, 417, 141, 450),
    "H200": Gpu(989, 494, 141, 450),
    "H100 NVL": Gpu(835, 417, 94, 300),
    "H100 PCIe": Gpu(756, 378, 80, 64),
    "H100": Gpu(989, 494, 80, 450),
    "A100": Gpu(312, 156, 80, 300),
    "L40S": Gpu(362, 183, 48, 32),
    "L40": Gpu(181, 90.5, 48, 32),
    "L4": Gpu(121, 60, 24, 32),
    "A10G": Gpu(70, 35, 24, 32),
    "A10": Gpu(125, 62.5, 24, 32),
    "V100-PCIE": Gpu(112, 14, 32, 16),
    "V100": Gpu(125, 15.7, 32, 150),
    "T4": Gpu(65, 8.1, 16, 16),
    "RTX 6000 Ada": Gpu(364, 182, 48, 32),
    "A6000": Gpu(155, 77, 48, 32),
    "5090": Gpu(209, 105, 32, 64),
    "4090": Gpu(165, 82.6, 24, 32),
    "3090": Gpu(71, 35.6, 24, 32),
}
VARIANTS = r"\b(Ti|D|Laptop|MIG)\b"  # slower or faster than the GPU they are named after
# Width of the matrix product that is timed where no data sheet is known. At 1,024 a CPU reaches its
# peak within milliseconds; a GPU is not busy below some thousands, and takes less than a second.
TIMED_WIDTH = {"cpu": 1024, "cuda": 8192, "mps": 4096}


def find_gpu(name: str) -> Gpu | None:
    """The GPU that torch calls by this name, or None where its data sheet is not known."""
    if re.search(VARIANTS, name):
        return None
    return next((gpu for key, gpu in GPUS.items() if re.search(rf"\b{key}\b", name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is measured against: the data sheet's, else a large product timed here."""
    if device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(device))
        if gpu is not None:
            return gpu.flops(dtype_name(dtype))
    return measured_flops(device, dtype, width=TIMED_WIDTH[device.type])


def measured_flops(device: torch.device, dtype: torch.dtype, *, width: int) -> float:
    """FLOP/s of square matrix products as in training: the best of three, after two to warm up."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own stays where it is
    a = torch.randn(width, width, generator=generator, device=device).to(dtype)
    seconds = []
    with training_arithmetic(device, dtype):
        for _ in range(5):
            started = time.perf_counter()
            (a @ a)[0, 0].item()  # .item() waits for the device
            seconds.append(time.perf_counter() - started)
    return 2 * width**3 / min(seconds[2:])
